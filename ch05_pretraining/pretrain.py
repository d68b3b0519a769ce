"""Pretrain a GPT on text files or tales: one process or many, interrupted at any moment and continued exactly.

    python ch05_pretraining/pretrain.py --recipe ch05_pretraining/recipes/tales-tiny.toml --out build/tales-tiny
    python ch05_pretraining/pretrain.py --data books/ --tokenizer gpt2 --preset gpt2-small --out build/books
    torchrun --nproc-per-node 2 ch05_pretraining/pretrain.py --recipe RECIPE --out build/run --parallel fsdp

The same command again continues the run that it finds in --out. Batches and dropout depend on (seed, step) alone, so
the continued run has the losses of an unbroken one of as many processes and threads, to the last digit. SIGTERM and
SIGINT (Ctrl-C) save and stop after the current step, with exit status 0. --out holds checkpoints/, log.csv,
evaluation.csv, tensorboard/, shards/ and a lock. Errors are one line and exit status 1, and lose nothing that was saved
before.
"""

import datetime
import math
import signal
import statistics
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from torch import nn

from shared.model.gpt import GPTConfig, GPTModel
from shared.model.layers import balance_loss
from shared.pretraining.log import RunLog, lock_folder
from shared.pretraining.options import Options, read_options
from shared.pretraining.processes import Processes, end_this_process, hardware, like, share_gradients, whole
from shared.pretraining.rows import DocumentRows, WindowRows, repeated_targets
from shared.pretraining.shards import TextShards, load_encoding, tokenise, tokenise_tales
from shared.tales.distribution import expected_loss, next_tokens
from shared.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_model_state,
    model_state,
    save_checkpoint,
)
from shared.training.losses import bits_per_byte, next_token_loss
from shared.training.optimizers import build_optimizers, set_learning_rates
from shared.training.schedules import build_schedule
from shared.weights.files import save_checkpoint_folder
from shared.weights.pretrained import load_pretrained


class Diverged(Exception):
    """The loss of step `step` is not finite or has exploded."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(f"step {step}: {message}")
        self.step = step


def prepare_data(options: Options) -> tuple[TextShards, list[Path]]:
    """Return the training shards and the paths of the validation shards; what is done already is not done again."""
    folder = Path(options.shards or Path(options.out) / "shards")
    if options.is_tales:
        numbers = (
            options.tales_stories,
            options.tales_seed,
            options.tales_validation,
            options.tales_validation_seed,
        )
        shards = tokenise_tales(folder, *numbers)
        return shards, shards.validation
    settings = {"separator": options.separator, "pattern": options.pattern, "seed": options.seed}
    settings["workers"] = options.workers
    fraction = 0.0 if options.validation_data else options.validation_fraction
    shards = tokenise(options.data, folder, options.tokenizer, validation_fraction=fraction, **settings)
    held_out = shards.validation
    if options.validation_data:
        extra = tokenise(
            options.validation_data, folder, options.tokenizer, validation_fraction=1.0, **settings
        )
        held_out = extra.validation
    for side, paths in (("training", shards.train), ("validation", held_out)):
        if not paths:
            raise ValueError(
                f"no document is left for {side}: see --separator, --validation-fraction, --validation-data"
            )
    return shards, held_out


@torch.no_grad()
def initialise_mimetically(model: GPTModel) -> None:
    """Let attention begin as a search for like tokens that copies what it finds (Trockman and Kolter, 2023).

    Half of each key map becomes that of its queries, so that vectors score high with their like, and the output map
    undoes the value map. A small model then learns early to repeat what stands far back in the text.
    Raises ValueError if there are fewer key heads than query heads.
    """
    for block in model.blocks:
        attention = block.attention
        if attention.n_kv_heads != attention.n_heads:
            raise ValueError(f"mimetic needs n_kv_heads={attention.n_heads}, got {attention.n_kv_heads}")
        query, key, value = attention.qkv.weight.chunk(3)
        key.lerp_(query, 0.5)
        attention.output.weight.copy_(value.T)


@torch.no_grad()
def begin_from(model: GPTModel, name: str) -> None:
    """Copy trained weights of the same shape, but for layers that `model` has more; those go on top.

    A new layer begins with attention that looks for tokens like the one predicted and speaks against them, as copy
    suppression does in GPT-2 (McDougall et al., 2023, "Copy Suppression: Comprehensively Understanding an Attention
    Head"), and with a feed-forward part that adds nothing. With fewer key heads than query heads its attention adds
    nothing either.

    Raises:
        ValueError: The models differ in more than that, or new layers would have experts.
    """
    source = load_pretrained(name, dtype=torch.float32)
    ours, theirs = asdict(model.config), asdict(source.config)
    free = {"dropout", "init_std"} | ({"n_layers"} if ours["n_layers"] > theirs["n_layers"] else set())
    wrong = [
        f"{key}={theirs[key]}, not {ours[key]}" for key in ours.keys() - free if ours[key] != theirs[key]
    ]
    if wrong:
        raise ValueError(f"start_from is {name}; its model has {'; '.join(sorted(wrong))}")
    if len(model.blocks) > len(source.blocks) and model.config.feed_forward == "moe":
        raise ValueError(f"start_from is {name}; layers with experts cannot be added")
    load_model_state(model, {**model_state(model), **model_state(source)})
    for block in model.blocks[len(source.blocks) :]:
        # Without the factor the new layer would hardly be heard: its output joins the sum of all layers below.
        attention = block.attention
        if attention.n_kv_heads == attention.n_heads:
            query, key, value = attention.qkv.weight.chunk(3)
            key.lerp_(query, 0.5)
            attention.output.weight.copy_(-4 * value.T)
        else:
            attention.output.weight.zero_()
        block.feed_forward.down.weight.zero_()


class Run:
    """A training run: everything that a step needs, and everything that a checkpoint holds."""

    def __init__(self, options: Options, processes: Processes) -> None:
        self.options, self.processes, self.folder = options, processes, Path(options.out)
        parts = processes.world * options.accumulation
        if options.batch_size % parts:
            raise ValueError(
                f"batch_size is {options.batch_size}; processes x accumulation need a multiple of {parts}"
            )
        encoding = self.encoding = load_encoding(options.tokenizer)
        self.config = GPTConfig.preset(options.preset, **{"vocab_size": encoding.n_vocab, **options.model})
        if self.config.vocab_size < encoding.n_vocab:
            raise ValueError(
                f"vocab_size is {self.config.vocab_size}; the tokenizer has {encoding.n_vocab} tokens"
            )
        factor = {"decay": options.decay} if options.schedule == "wsd" else {}
        self.schedule = build_schedule(options.schedule, options.steps, options.warmup_steps, **factor)
        self.lock = processes.on_first(lambda: lock_folder(self.folder))
        processes.on_first(lambda: prepare_data(options))
        self.shards, validation = prepare_data(options)
        self.train_rows = self._rows(self.shards.train, options.batch_size, encoding.eot_token)
        self.validation_rows = self._rows(validation, 1, encoding.eot_token)
        self.floor = self.shards.floor if options.rows == "documents" else None
        whole_rows = [self.validation_rows] if self.floor else []
        whole_rows += [self.train_rows] if options.exact_targets else []
        if any(rows.lengths.max() > self.config.context_length for rows in whole_rows):
            raise ValueError(f"context_length is {self.config.context_length}: shorter than the longest tale")
        lengths = [0] * self.config.vocab_size
        for token in encoding.token_byte_values():
            lengths[encoding.encode_single_token(token)] = len(token)
        self.token_bytes = torch.tensor(lengths, device=processes.device)
        self.rare = None
        if options.repeat_weight:
            shares = self.train_rows.token_shares(self.config.vocab_size)
            self.rare = (shares <= options.repeat_share).to(processes.device)
        self._build_model()
        self.step = self.skipped = self.rollbacks = self.tokens = 0
        self.cpu_before = 0.0  # of the processes before this one
        self.recent: deque[float] = deque(maxlen=100)
        self.pending: list[tuple] = []
        self.evaluation: dict[str, float] = {}
        self.signalled = False
        self.log: RunLog | None = None

    def _rows(self, shards: list[Path], batch_size: int, end: int) -> DocumentRows | WindowRows:
        length, seed = self.config.context_length, self.options.seed
        if self.options.rows == "windows":
            return WindowRows(shards, length, batch_size, seed)
        return DocumentRows(shards, length, batch_size, end, seed, self.options.length_pool)

    def _build_model(self) -> None:
        options = self.options
        torch.manual_seed(options.seed)
        self.model = GPTModel(self.config).to(self.processes.device)
        if options.mimetic:
            initialise_mimetically(self.model)
        if options.start_from and latest_checkpoint(self.folder / "checkpoints") is None:
            begin_from(self.model, options.start_from)
        if options.compile:
            self.model.compile()
        self.forward = self.processes.spread(self.model, options.parallel)
        rates = {"weight_decay": options.weight_decay, "betas": (options.beta1, options.beta2)}
        rates["matrix_learning_rate"] = options.matrix_learning_rate
        self.optimizers = build_optimizers(self.model, options.optimizer, options.learning_rate, **rates)

    def open_log(self) -> None:
        """Open the log, cut back to the current step; only the first process has one."""
        if self.log:
            self.log.close()
        if self.processes.rank == 0:
            self.log = RunLog(self.folder, self.step, self.options.tensorboard)

    def autocast(self) -> torch.autocast | nullcontext:
        """Return the context of the forward pass."""
        device, lower = self.processes.device.type, self.options.precision == "bf16"
        return torch.autocast(device, torch.bfloat16) if lower else nullcontext()

    def gradients(self) -> tuple[torch.Tensor, int]:
        """Compute the gradients of this step; return this process's part of the loss, and the number of targets."""
        options, processes, number = self.options, self.processes, self.step + self.skipped
        rows = self.train_rows.batch(number)
        n_targets = self.train_rows.n_targets(rows)
        if self.config.dropout:
            source = np.random.SeedSequence([options.seed, number, processes.rank])
            torch.manual_seed(int(source.generate_state(1, np.uint64)[0]))
        size = len(rows) // (processes.world * options.accumulation)
        first = processes.rank * options.accumulation
        loss = torch.zeros((), device=processes.device)
        for part in range(first, first + options.accumulation):
            inputs, targets = self.train_rows.tensors(rows[part * size : (part + 1) * size])
            inputs, targets = inputs.to(processes.device), targets.to(processes.device)
            with share_gradients(self.forward, part == first + options.accumulation - 1):
                with self.autocast():
                    logits = self.forward(inputs)
                    losses, outside = (each / n_targets for each in self._losses(logits, targets))
                part_loss = losses.sum()
                loss += part_loss.detach()
                if options.outside_weight:
                    part_loss = part_loss + options.outside_weight * outside.sum()
                if self.rare is not None and options.repeat_from <= self.step < options.repeat_until:
                    repeated = repeated_targets(inputs, targets, self.rare)
                    part_loss = part_loss + options.repeat_weight * losses[repeated].sum()
                if self.config.feed_forward == "moe" and options.balance_weight:
                    n_parts = processes.world * options.accumulation
                    part_loss = part_loss + options.balance_weight / n_parts * balance_loss(self.model)
                # Gradients are averaged over the processes, and the loss is a sum over them.
                (part_loss * processes.world).backward()
        return loss, n_targets

    def _losses(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each target in nats, and the share of it that tokens outside of the grammar cause."""
        if not self.options.exact_targets:
            losses = next_token_loss(logits, targets, reduction="none")
            return losses, torch.zeros_like(losses)
        stories = [self.encoding.decode(row[row >= 0][:-1].tolist()) for row in targets]
        return expected_loss(logits, map(next_tokens, stories))

    def train_step(self) -> None:
        """Make one update; its loss is looked at later."""
        warming = self.step < self.options.warmup_steps  # the first step of a warm-up is not to be lost
        set_learning_rates(self.optimizers, self.schedule(self.step + warming))
        loss, n_targets = self.gradients()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm or math.inf)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()
        self.step += 1
        self.tokens += n_targets
        rate = self.optimizers[-1].param_groups[0]["lr"]
        self.pending.append((self.step, loss, whole(norm), rate, self.tokens))

    def look(self) -> None:
        """Read and log the losses since the last look. Raises Diverged for the first that is not as it should be."""
        if not self.pending:
            return
        steps, losses, norms, rates, tokens = zip(*self.pending, strict=True)
        self.pending.clear()
        losses = self.processes.total(torch.stack(losses)).tolist()
        norms, cpu = torch.stack(norms).tolist(), self.cpu_seconds()
        for step, loss, norm, rate, seen in zip(steps, losses, norms, rates, tokens, strict=True):
            if self.log:
                row = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": seen}
                self.log.training({**row, "cpu_seconds": round(cpu, 3)})
            median = statistics.median(self.recent) if self.recent else math.inf
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(step, f"loss {loss}, gradient norm {norm}: not finite")
            limit = self.options.spike_factor * median if self.options.spike_factor else math.inf
            if len(self.recent) >= 20 and loss > limit:
                raise Diverged(
                    step, f"loss {loss:.4f}: exploded, the median of the last steps is {median:.4f}"
                )
            self.recent.append(loss)

    def cpu_seconds(self) -> float:
        """Return the processor time of all processes, those before an interruption included."""
        return self.cpu_before + self.processes.total(torch.tensor([time.process_time()])).item()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the losses on the validation rows: nats per token, bits per byte, nats per document, distance.

        They are those of the weights as they are exported, so nothing is rounded to bf16 here."""
        processes, rows = self.processes, self.validation_rows
        chosen = list(range(len(rows) if self.floor else min(len(rows), self.options.evaluation_rows)))
        if isinstance(rows, DocumentRows):
            chosen.sort(key=lambda row: rows.lengths[row])
        size = max(1, self.options.batch_size // self.options.accumulation)
        sums = torch.zeros(3, dtype=torch.float64, device=processes.device)  # nats, targets, bytes
        self.model.eval()
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            own = part[processes.rank :: processes.world]
            # A sharded model needs every process in every pass, also one that has no row left.
            inputs, targets = rows.tensors(own or part[:1])
            inputs, targets = inputs.to(processes.device), targets.to(processes.device)
            losses = next_token_loss(self.model(inputs), targets, reduction="none")
            counted = targets >= 0
            n_bytes = (self.token_bytes[targets.clamp(min=0)] * counted).sum()
            sums += bool(own) * torch.stack([losses.double().sum(), counted.sum().double(), n_bytes.double()])
        self.model.train()
        nats, n_targets, n_bytes = processes.total(sums).tolist()
        result = {"loss": nats / n_targets, "bits_per_byte": bits_per_byte(nats, round(n_bytes))}
        if isinstance(rows, DocumentRows):
            result["loss_per_document"] = nats / len(chosen)
        if self.floor:
            result["percent_above_floor"] = 100 * (result["loss_per_document"] / self.floor - 1)
        self.evaluation = {"step": self.step, "tokens": self.tokens, **result}
        row = {**self.evaluation, "cpu_seconds": round(self.cpu_seconds(), 3)}
        if self.log:
            self.log.evaluation(row)
        return result

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        model = {name: whole(tensor) for name, tensor in model_state(self.model).items()}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        for state in optimizers:
            state["state"] = {
                index: {key: whole(value) for key, value in values.items()}
                for index, values in state["state"].items()
            }
        extra = {"options": asdict(self.options), "processes": self.processes.world}
        extra |= {name: getattr(self, name) for name in ("skipped", "rollbacks", "tokens", "evaluation")}
        extra |= {
            "recent": list(self.recent),
            "cpu_seconds": self.cpu_seconds(),
            "data": self.shards.sha256,
        }

        def write() -> None:
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
        before, now = saved.extra["options"], asdict(self.options)
        fixed = [each.name for each in fields(Options) if not each.metadata["free"]]
        changed = [
            f"{name} {before.get(name)!r}, now {now[name]!r}"
            for name in fixed
            if before.get(name) != now[name]
        ]
        if saved.extra["data"] != self.shards.sha256:
            changed.append("other data")
        if changed:
            raise ValueError(f"{path} is of another run ({'; '.join(changed)}): choose another --out")
        if saved.extra["processes"] != self.processes.world:
            self.processes.say(
                f"note: saved by {saved.extra['processes']} processes, continued by {self.processes.world}: the "
                "losses agree up to rounding only"
            )
        own = model_state(self.model)
        load_model_state(
            self.model, {name: like(tensor, own.get(name)) for name, tensor in saved.model.items()}
        )
        for optimizer, state in zip(self.optimizers, saved.optimizers, strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for index, values in state["state"].items():
                state["state"][index] = {key: like(value, parameters[index]) for key, value in values.items()}
            optimizer.load_state_dict(state)
        self.step = saved.step
        for name in ("skipped", "rollbacks", "tokens", "evaluation"):
            setattr(self, name, saved.extra[name])
        self.recent = deque(saved.extra["recent"], maxlen=100)
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
        if self.forward is not self.model and self.step < self.options.steps:
            # DDP arranges its buckets anew after its first pass. Without this one, the first sums after an
            # interruption would be taken in another order than those of an unbroken run.
            self.gradients()
            self.model.zero_grad()
        options, started, since = self.options, time.perf_counter(), self.step
        stopping = False
        while self.step < options.steps and not stopping:
            self.train_step()
            # A signal may reach one process only, and at any time: what counts is what all have agreed on here.
            stopping = bool(self.processes.total(torch.tensor([self.signalled])))
            ends = stopping or self.step == options.steps
            evaluates = self.step % options.evaluate_every == 0 or self.step == options.steps
            saves = self.step % options.checkpoint_every == 0 or ends
            logs = self.step % options.log_every == 0
            if logs or evaluates or saves:
                try:
                    self.look()
                except Diverged as reason:
                    if options.on_divergence == "stop":
                        raise
                    self.roll_back(reason)
                    started, since = time.perf_counter(), self.step
                    continue
            if logs:
                seconds = (time.perf_counter() - started) / (self.step - since)
                left = datetime.timedelta(seconds=round((options.steps - self.step) * seconds))
                progress = f"step {self.step:,}/{options.steps:,}  loss {self.recent[-1]:.4f}"
                self.processes.say(f"{progress}  {seconds:.3f} s/step  {left} left")
            if evaluates:
                result = self.evaluate()
                self.processes.say("  validation: " + ", ".join(f"{k} {v:.4f}" for k, v in result.items()))
            if saves:
                self.save()

    def close(self) -> None:
        """Close the log and leave the folder to the next run."""
        for file in (self.log, self.lock):
            if file:
                file.close()

    def export(self, folder: Path) -> None:
        """Write the model in the format of `shared/checkpoints`: weights, and how they came about."""
        state = {name: whole(tensor) for name, tensor in model_state(self.model).items()}
        results = {
            **self.evaluation,
            "train_loss": statistics.fmean(self.recent),
            "parameters": self.model.n_parameters,
        }
        if self.floor:
            results["floor_per_document"] = self.floor
        details = {
            "recipe": asdict(self.options),
            "results": results,
            "hardware": hardware(self.processes),
            "cpu_seconds": round(self.cpu_seconds()),
        }
        self.processes.on_first(
            lambda: save_checkpoint_folder(self.model, folder, state=state, replace=True, **details)
        )


def main() -> None:
    """Run the command line."""
    processes = run = None
    try:
        options = read_options(__doc__)
        run = Run(options, processes := Processes(options.device, options.threads))
        run.restore()
        run.open_log()
        for number in (signal.SIGTERM, signal.SIGINT):
            # A second signal changes nothing: torchrun passes on what the terminal has sent already.
            signal.signal(number, lambda *_: setattr(run, "signalled", True))
        counts = run.shards.counts["train"]
        processes.say(
            f"{run.model.n_parameters:,} parameters, {counts['tokens']:,} tokens in {counts['documents']:,} documents, "
            f"{len(run.train_rows) // options.batch_size:,} steps an epoch, from step {run.step:,}"
        )
        if run.step == 0 and options.on_divergence == "rollback":
            run.save()
        run.advance()
        if run.step < options.steps:
            processes.say(f"stopped by a signal after step {run.step:,}; the same command continues")
        elif options.export:
            run.export(Path(options.export))
    except (ValueError, TypeError, OSError, Diverged) as error:
        raise SystemExit(f"pretrain: {error}") from error
    finally:
        for each in (run, processes):
            if each is not None:
                each.close()


if __name__ == "__main__":
    main()
    end_this_process()
