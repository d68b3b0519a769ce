"""A training run of `ch05_pretraining/pretrain.py`: steps, checks of the losses, checkpoints, rollbacks, the export.

Batches and dropout depend on the seed and the number of the batch alone, and a checkpoint holds everything else, so
that a run that was interrupted goes on to the last digit as if it had not been.

Left out, each in a module of its own: what a run begins with (`start`), what it minimizes (`objective`), one update of
the weights (`updates`), how the model is judged (`evaluation`), when a loss has diverged (`divergence`), and what a
checkpoint holds of a model that is spread over processes (`saving`).
"""

import datetime
import statistics
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.pretraining.divergence import COMPARED, Diverged, check_loss
from shared.pretraining.evaluation import HeldOut, token_byte_lengths
from shared.pretraining.log import RunLog, lock_folder, write_usage
from shared.pretraining.objective import Objective
from shared.pretraining.options import Options
from shared.pretraining.processes import Processes, hardware
from shared.pretraining.rows import counted
from shared.pretraining.saving import (
    check_same_run,
    gather_model,
    gather_optimizer,
    scatter_model,
    scatter_optimizer,
)
from shared.pretraining.shards import load_encoding
from shared.pretraining.start import build_model, check_batch_size, load_data, model_config, prepare_data
from shared.pretraining.updates import Updates, rate_factors
from shared.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from shared.weights.files import save_checkpoint_folder

# A step whose loss has not been read yet: its number, this process's part of the loss and the norm of the gradients (on
# the device), the learning rate, and the targets seen.
PendingStep = tuple[int, Tensor, Tensor, float, int]


class Run:
    """A training run: everything that a step needs, and everything that a checkpoint holds.

    Args:
        options: Of the run.
        processes: This process among those of the run.

    Attributes:
        step: Updates done.
        skipped: Batches that were left out after rollbacks.
        rollbacks: How often the run went back to a checkpoint.
        tokens: Targets seen.
        recent: The last losses.
        pending: Steps whose losses have not been checked.
        evaluation: Figures of the last evaluation.
        signalled: Set it to stop after the current step.

    Raises:
        ValueError: Options that do not fit each other or the data.
        OSError: The folder cannot be written or is in use by another run.
    """

    def __init__(self, options: Options, processes: Processes) -> None:
        self.options, self.processes, self.folder = options, processes, Path(options.out)

        # What can be wrong without any data is found before the folder is touched.
        check_batch_size(options, processes.world_size)
        self.encoding = load_encoding(options.tokenizer)
        self.config = model_config(options, self.encoding)
        factors = rate_factors(asdict(options))

        # The first process takes the folder; trained weights to begin with are read before the long work.
        self.lock = processes.on_first(lambda: lock_folder(self.folder))
        is_new = latest_checkpoint(self.folder / "checkpoints") is None
        self.model = build_model(options, self.config, processes.device, is_new)

        # The first process prepares the data; then all of them read the same files.
        processes.on_first(lambda: prepare_data(options))
        data = load_data(options, self.config, self.encoding)
        self.shards, self.floor = data.shards, data.floor
        self.train_rows, self.validation_rows = data.train_rows, data.validation_rows

        # The model's updates, and on what it is judged.
        objective = Objective(
            options, self.encoding, self.train_rows, self.config.vocab_size, processes.device
        )
        self.updates = Updates(options, processes, self.model, self.train_rows, objective, factors)
        token_bytes = token_byte_lengths(self.encoding, self.config.vocab_size)
        self.held_out = HeldOut(options, self.validation_rows, token_bytes, self.floor)
        self.usage = {"training": self.train_rows.usage(), "validation": self.held_out.usage()}

        # Where the run stands; `restore` goes on from a checkpoint.
        self.step = self.skipped = self.rollbacks = self.tokens = 0
        self.cpu_before = 0.0  # processor time before this process began
        self.recent: deque[float] = deque(maxlen=COMPARED)
        self.pending: list[PendingStep] = []
        self.evaluation: dict[str, float] = {}
        self.signalled = False
        self.log: RunLog | None = None

    def open_log(self) -> None:
        """Open the log, cut back to the current step; only the first process has one."""
        if self.log:
            self.log.close()
        if self.processes.rank == 0:
            self.log = RunLog(self.folder, self.step, self.options.tensorboard)
            write_usage(self.folder, self.usage)

    def say_what_it_does(self) -> None:
        """Print what is trained on what, and how much of the text is used; warn where most of it is not."""
        options, say = self.options, self.processes.say

        # What was read, and how it is divided.
        files = counted(self.shards.files, "file") if self.shards.files else "tales"
        documents = counted(self.shards.counts["train"]["documents"], "document")
        held_out = "; the end of each file is for validation" if self.shards.by_position else ""
        say(f"data: {files}, {documents} for training{held_out}")
        for side, usage in self.usage.items():
            say(f"{side}: {usage}")
            if usage.used < usage.tokens / 2:
                say(f"WARNING: most of the text for {side} is not used. {self._advice()}")

        # How long the run is.
        steps_an_epoch = len(self.train_rows) // options.batch_size
        say(
            f"model: {self.model.n_parameters:,} parameters; {counted(steps_an_epoch, 'step')} an epoch, "
            f"{options.steps:,} in all ({options.steps / steps_an_epoch:.3g} epochs), from step {self.step:,}"
        )

    def _advice(self) -> str:
        if self.options.rows == "documents":
            return "--rows windows uses all of it; a longer context_length uses more."
        return "A shorter context_length, a smaller --batch-size or a larger --evaluation-rows uses more."

    def gradients(self) -> tuple[Tensor, int]:
        """Compute the gradients of this step; return this process's part of the loss, and the number of targets."""
        return self.updates.gradients(self.step, self.step + self.skipped)

    def train_step(self) -> None:
        """Make one update; its loss is checked later."""
        loss, norm, rate, n_targets = self.updates.update(self.step, self.step + self.skipped)
        self.step += 1
        self.tokens += n_targets
        self.pending.append((self.step, loss, norm, rate, self.tokens))

    def check_losses(self) -> None:
        """Read and log the losses since the last check. Raises Diverged for the first that is not as it should be."""
        if not self.pending:
            return
        # Reading a loss waits for the device and for all processes, so it is done for many steps at once.
        steps, losses, norms, rates, tokens = zip(*self.pending, strict=True)
        self.pending.clear()
        totals = self.processes.total(torch.stack(losses)).tolist()
        lengths, cpu_seconds = torch.stack(norms).tolist(), round(self.cpu_seconds(), 3)
        for step, loss, norm, rate, seen in zip(steps, totals, lengths, rates, tokens, strict=True):
            # The log first: what has diverged stands in it too.
            if self.log:
                row = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": seen}
                self.log.training({**row, "cpu_seconds": cpu_seconds})
            check_loss(step, loss, norm, self.recent, self.options.spike_factor)
            self.recent.append(loss)

    def cpu_seconds(self) -> float:
        """Return the processor time of all processes, those before an interruption included."""
        return self.cpu_before + self.processes.total(torch.tensor([time.process_time()])).item()

    def evaluate(self) -> dict[str, float]:
        """Return and log the losses on the validation rows: nats per token, bits per byte, per document, distance.

        They are those of the weights as they are exported.
        """
        result = self.held_out.losses(self.model, self.processes)
        self.evaluation = {"step": self.step, "tokens": self.tokens, **result}
        row = {**self.evaluation, "cpu_seconds": round(self.cpu_seconds(), 3)}
        if self.log:
            self.log.evaluation(row)
        return result

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        # Gathering needs every process, so it comes before the part that only the first one does.
        model = gather_model(self.model)
        optimizers = [gather_optimizer(optimizer) for optimizer in self.updates.optimizers]
        extra = {
            "options": asdict(self.options),
            "processes": self.processes.world_size,
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "tokens": self.tokens,
            "evaluation": self.evaluation,
            "recent": list(self.recent),
            "cpu_seconds": self.cpu_seconds(),
            "data": self.shards.sha256,
        }

        def write() -> None:
            # The log first: a checkpoint without the rows up to its step could not be continued to the same files.
            if self.log:
                self.log.to_disk()
            folder, keep = self.folder / "checkpoints", self.options.keep_last
            found = latest_checkpoint(folder)
            if found is None or found.name != f"step-{self.step:08d}":
                save_checkpoint(folder, self.step, model, optimizers, extra=extra, keep_last=keep)

        self.processes.on_first(write)

    def restore(self) -> None:
        """Take up the newest checkpoint, if there is one. Raises ValueError if it is of another run."""
        path = latest_checkpoint(self.folder / "checkpoints")
        if path is None:
            return
        saved = load_checkpoint(path)
        check_same_run(path, saved, self.options, self.shards.sha256)
        if saved.extra["processes"] != self.processes.world_size:
            self.processes.say(
                f"note: saved by {saved.extra['processes']} processes, continued by {self.processes.world_size}: "
                "the losses agree up to rounding only"
            )

        # Weights, the optimizers' memory, and where the run stood.
        scatter_model(self.model, saved.model)
        for optimizer, state in zip(self.updates.optimizers, saved.optimizers, strict=True):
            scatter_optimizer(optimizer, state)
        self.step = saved.step
        self.skipped = saved.extra["skipped"]
        self.rollbacks = saved.extra["rollbacks"]
        self.tokens = saved.extra["tokens"]
        self.evaluation = saved.extra["evaluation"]
        self.recent = deque(saved.extra["recent"], maxlen=COMPARED)
        self.cpu_before = max(self.cpu_before, saved.extra["cpu_seconds"] - self.cpu_seconds())

    def roll_back(self, reason: Diverged) -> None:
        """Return to the newest checkpoint and skip the batches up to the one that `reason` names."""
        if self.rollbacks >= self.options.max_rollbacks:
            raise reason
        rollbacks, skipped = self.rollbacks + 1, self.skipped
        self.restore()
        self.rollbacks, self.skipped = rollbacks, skipped + reason.step - self.step
        self.open_log()
        self.processes.say(f"{reason}; back to step {self.step}, batches up to there are skipped")

    def advance(self) -> None:
        """Train until the last step or a signal, with all evaluations and checkpoints on the way."""
        options = self.options

        # DDP arranges its buckets anew after its first pass. Without this one, the first sums after an interruption
        # would be taken in another order than those of an unbroken run.
        if self.updates.is_shared and self.step < options.steps:
            self.gradients()
            self.model.zero_grad()

        started, since = time.perf_counter(), self.step
        stopping = False
        while self.step < options.steps and not stopping:
            self.train_step()

            # A signal may reach one process only, and at any time: what counts is what all have agreed on here.
            stopping = bool(self.processes.total(torch.tensor([self.signalled])))
            is_last = self.step == options.steps
            logs = self.step % options.log_every == 0
            evaluates = self.step % options.evaluate_every == 0 or is_last
            saves = self.step % options.checkpoint_every == 0 or is_last or stopping

            # Losses are checked before anything is built on them.
            if logs or evaluates or saves:
                try:
                    self.check_losses()
                except Diverged as reason:
                    if options.on_divergence == "stop":
                        raise
                    self.roll_back(reason)
                    started, since = time.perf_counter(), self.step
                    continue

            # What is due after this step.
            if logs:
                self._report((time.perf_counter() - started) / (self.step - since))
            if evaluates:
                result = self.evaluate()
                self.processes.say("  validation: " + ", ".join(f"{k} {v:.4f}" for k, v in result.items()))
            if saves:
                self.save()

    def _report(self, seconds: float) -> None:
        """Print one line: where the run stands, and how long the rest takes at `seconds` a step."""
        left = datetime.timedelta(seconds=round((self.options.steps - self.step) * seconds))
        self.processes.say(
            f"step {self.step:,}/{self.options.steps:,}  loss {self.recent[-1]:.4f}  "
            f"{seconds:.3f} s/step  {left} left"
        )

    def close(self) -> None:
        """Close the log and leave the folder to the next run."""
        for file in (self.log, self.lock):
            if file:
                file.close()

    def export(self, folder: Path) -> None:
        """Write the model in the format of `shared/checkpoints`: weights, and how they came about."""
        # Every process gives its part of the weights.
        state = gather_model(self.model)

        # What the reader of a folder wants to know about them.
        results: dict[str, Any] = {
            **self.evaluation,
            "train_loss": statistics.fmean(self.recent),
            "parameters": self.model.n_parameters,
        }
        if self.floor:
            results["floor_per_document"] = self.floor
        details: dict[str, Any] = {
            "recipe": asdict(self.options),
            "results": results,
            "hardware": hardware(self.processes),
            "cpu_seconds": round(self.cpu_seconds()),
        }
        self.processes.on_first(
            lambda: save_checkpoint_folder(self.model, folder, state=state, replace=True, **details)
        )
