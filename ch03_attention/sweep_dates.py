"""Train sequence-to-sequence models on dates for several seeds and record how well they do in `sweep_dates.csv`.

    python sweep_dates.py                                    every model, full and short, the seeds of the record
    python sweep_dates.py --model attention --seeds 0 1      only some
    python sweep_dates.py --model attention --recipe short   only the short recipe, which the notebook runs as well
    python sweep_dates.py --curves                           models of --model on single dates: `sweep_dates_curves.csv`

A run replaces the row of the same model, recipe and seed; the other rows stay. A further model is one more entry
of `MODELS`: any module with `forward(source_ids, source_mask, target_ids)` -> logits, and with `encode` and
`decode_step` as `shared.model.seq2seq.SequenceModel` says. One thread is used; on another processor the last decimals
differ.
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from shared.model.seq2seq import EncoderDecoder, SequenceModel, greedy_decode
from shared.model.transformer import BlockConfig, Transformer
from shared.notebook.records import replace_rows
from shared.pretraining.processes import cpu_name
from shared.text.dates import (
    END_ID,
    PAD_ID,
    START_ID,
    VOCAB_SIZE,
    DateGenerator,
    ids_to_text,
    split_days,
)

RESULTS = Path(__file__).resolve().parent / "sweep_dates.csv"
CURVES = RESULTS.with_name("sweep_dates_curves.csv")
N_EXAMPLES = 200  # validation inputs for each number of dates
TEST_SEED = 12345  # of the validation inputs, the same for every model and seed
LETTERS_PER_DATE = 11  # "2026-11-03" and a blank or the end
WINDOW = 50  # steps that a recorded loss is the mean of
WATCH = 25  # steps between two points of a curve


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        name: What the command line and the record call it.
        steps: Updates of the weights.
        max_dates: Inputs hold 1 to this number of dates.
        curriculum: Share of the steps in which that number grows from 1 to `max_dates`.
        batch_size: Inputs a step, all with the same number of dates.
        warmup: Steps in which the learning rate rises; then it falls as a cosine to nearly 0.
        clip: The largest norm of the gradient.
    """

    name: str
    steps: int
    max_dates: int
    curriculum: float
    batch_size: int = 64
    warmup: int = 50
    clip: float = 1.0


@dataclass(frozen=True)
class ModelEntry:
    """A model of the sweep: how it is built, its peak learning rate, the seeds that are recorded.

    A recipe's number of steps is multiplied by `stretch`.
    """

    build: Callable[[], nn.Module]
    learning_rate: float
    seeds: tuple[int, ...] = (0, 1, 2)
    stretch: int = 1


@dataclass(frozen=True)
class Run:
    """A finished run: the trained model, its loss at every step, and the row of the record."""

    model: nn.Module
    losses: list[float]
    row: dict[str, object]


@dataclass(frozen=True)
class Curve:
    """A finished run on single dates: the trained model, and a row of the record every `WATCH` steps."""

    model: nn.Module
    rows: list[dict[str, object]]


def paper_transformer() -> Transformer:
    """Return a small Transformer in the order of the paper: post-norm, one matrix for the three uses, sinusoids."""
    config = BlockConfig(emb_dim=64, n_heads=4, feed_forward_dim=128, dropout=0.0)
    return Transformer(config, VOCAB_SIZE, n_encoder_layers=2, n_decoder_layers=2, context_length=256)


RECIPES = {
    "full": Recipe("full", steps=1200, max_dates=6, curriculum=0.4),
    "short": Recipe("short", steps=300, max_dates=2, curriculum=0.5),
}
MODELS = {
    "fixed": ModelEntry(lambda: EncoderDecoder(VOCAB_SIZE, 32, 64), 8e-3),
    "attention": ModelEntry(lambda: EncoderDecoder(VOCAB_SIZE, 32, 64, attention_size=32), 8e-3),
    # Three times the weights, to see whether size replaces attention; one seed, as it takes long.
    "fixed-wide": ModelEntry(lambda: EncoderDecoder(VOCAB_SIZE, 32, 128), 6e-3, seeds=(0,)),
    "transformer": ModelEntry(paper_transformer, 5e-3),
    "transformer-long": ModelEntry(paper_transformer, 5e-3, stretch=3),
}
ONE_DATE = Recipe("one-date", steps=600, max_dates=1, curriculum=1.0)  # of the curves
CURVE_MODELS = ("fixed", "attention", "transformer")
COLUMNS = [
    "recipe",
    "model",
    "seed",
    "parameters",
    "steps",
    "batch_size",
    "learning_rate",
    "max_dates",
    "cpu_seconds",
    "hardware",
    "torch",
    "first_loss",
    "last_loss",
    "n_examples",
    *(f"exact_{n_dates}" for n_dates in range(1, 7)),
]
CURVE_COLUMNS = [
    "model",
    "seed",
    "step",
    "parameters",
    "learning_rate",
    "loss",
    "exact_1",
    "n_examples",
    "cpu_seconds",
    "hardware",
    "torch",
]


def train(
    entry: ModelEntry,
    seed: int,
    recipe: Recipe,
    watch: Callable[[nn.Module, list[float]], None] | None = None,
) -> tuple[nn.Module, list[float]]:
    """Build a model, train it by teacher forcing on training days, and return it with its loss at each step.

    `watch` is called after each step with the model and the losses so far.
    """
    # Weights, dates and their number are drawn from seeds of their own.
    torch.manual_seed(seed)
    model = entry.build()
    generator = DateGenerator(split_days()[0], seed)
    draw = random.Random(seed + 1).random

    # The learning rate rises in a straight line, then falls as a cosine.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=entry.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )

    def rate(step: int) -> float:
        return min((step + 1) / recipe.warmup, 0.5 * (1 + math.cos(math.pi * step / recipe.steps)) + 0.01)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    # One batch a step, all of it with the same number of dates.
    losses = []
    for step in tqdm(range(recipe.steps), desc="training", unit="step", leave=False):
        # Short inputs first: the largest number of dates grows with the steps.
        progress = min(1.0, step / (recipe.curriculum * recipe.steps))
        longest = min(recipe.max_dates, 1 + int(recipe.max_dates * progress))
        batch = generator.batch(recipe.batch_size, 1 + int(draw() * longest))

        # Teacher forcing: the model reads the right letters up to each place and predicts the next.
        logits = model(batch.source_ids, batch.source_mask, batch.target_ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch.target_ids[:, 1:].flatten(), ignore_index=PAD_ID)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if watch is not None:
            watch(model, losses)
    return model.eval(), losses


def exact_matches(model: SequenceModel, n_dates: int, n_examples: int = N_EXAMPLES) -> int:
    """Return how many of `n_examples` validation inputs with `n_dates` dates are written without any mistake."""
    batch = DateGenerator(split_days()[1], TEST_SEED).batch(n_examples, n_dates)
    length = LETTERS_PER_DATE * n_dates
    written = greedy_decode(model, batch.source_ids, batch.source_mask, START_ID, END_ID, length)
    return sum(ids_to_text(ids) == target for ids, target in zip(written, batch.targets, strict=True))


def run(model: str, seed: int, recipe: str) -> Run:
    """Train and evaluate one model of `MODELS` by one recipe of `RECIPES`.

    Raises:
        ValueError: The model or the recipe is unknown.
    """
    for name, value, allowed in (("model", model, MODELS), ("recipe", recipe, RECIPES)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")

    # Training is what the processor time is taken of.
    entry, plan = MODELS[model], RECIPES[recipe]
    plan = replace(plan, steps=entry.stretch * plan.steps)
    started = time.process_time()
    trained, losses = train(entry, seed, plan)
    seconds = time.process_time() - started

    # The row of the record, with what the figures depend on.
    row = {
        "recipe": recipe,
        "model": model,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "learning_rate": entry.learning_rate,
        "max_dates": plan.max_dates,
        "cpu_seconds": round(seconds),
        "hardware": f"{cpu_name()}, 1 thread",
        "torch": torch.__version__,
        "first_loss": round(sum(losses[:WINDOW]) / WINDOW, 5),
        "last_loss": round(sum(losses[-WINDOW:]) / WINDOW, 5),
        "n_examples": N_EXAMPLES,
    }
    for n in range(1, plan.max_dates + 1):
        row[f"exact_{n}"] = exact_matches(trained, n)
    return Run(trained, losses, row)


def learning_curve(model: str, seed: int) -> Curve:
    """Train one model of `MODELS` on single dates by `ONE_DATE`, and count exact matches every `WATCH` steps.

    The counting is left out of the recorded processor time.

    Raises:
        ValueError: The model is unknown.
    """
    if model not in MODELS:
        raise ValueError(f"model is {model!r}; allowed are {', '.join(MODELS)}")
    entry, rows = MODELS[model], []
    started, counting = time.process_time(), 0.0

    # Called after each step: every `WATCH` steps the clock stands still, and a row of the record is added.
    def watch(trained: nn.Module, losses: list[float]) -> None:
        nonlocal counting
        if len(losses) % WATCH:
            return
        paused = time.process_time()
        row = {
            "model": model,
            "seed": seed,
            "step": len(losses),
            "parameters": sum(parameter.numel() for parameter in trained.parameters()),
            "learning_rate": entry.learning_rate,
            "loss": round(sum(losses[-WATCH:]) / WATCH, 5),
            "exact_1": exact_matches(trained.eval(), 1),
            "n_examples": N_EXAMPLES,
            "cpu_seconds": round(paused - started - counting, 1),
            "hardware": f"{cpu_name()}, 1 thread",
            "torch": torch.__version__,
        }
        rows.append(row)
        trained.train()
        counting += time.process_time() - paused

    # The watcher fills `rows`.
    trained, _ = train(entry, seed, ONE_DATE, watch)
    return Curve(trained, rows)


def save(row: dict[str, object], path: Path = RESULTS) -> None:
    """Write a row to the record atomically; it replaces the row of the same model, recipe and seed."""
    key = lambda entry: (str(entry["recipe"]), str(entry["model"]), int(entry["seed"]))
    replace_rows(path, COLUMNS, [row], key)


def save_curve(curve: Curve, path: Path = CURVES) -> None:
    """Write the rows of a curve to the record atomically; they replace those of the same model and seed."""
    key = lambda entry: (str(entry["model"]), int(entry["seed"]))
    replace_rows(path, CURVE_COLUMNS, curve.rows, key)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", nargs="+", choices=MODELS, default=list(MODELS), help="default: all of them"
    )
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: both")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the record")
    parser.add_argument(
        "--curves", action="store_true", help="record learning curves on single dates instead"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that sums are taken in one order

    # Curves on single dates, where they are asked for.
    if options.curves:
        for model in [name for name in options.model if name in CURVE_MODELS]:
            for seed in options.seeds or MODELS[model].seeds:
                curve = learning_curve(model, seed)
                save_curve(curve)
                print(
                    f"curve {model} seed {seed}: exact {[row['exact_1'] for row in curve.rows]}", flush=True
                )
        return

    # Otherwise every recipe with every model and seed.
    for recipe in options.recipe:
        for model in options.model:
            recorded = MODELS[model].seeds[: 2 if recipe == "short" else None]
            for seed in options.seeds or recorded:
                row = run(model, seed, recipe).row
                save(row)
                exact = [row[f"exact_{n}"] for n in range(1, RECIPES[recipe].max_dates + 1)]
                line = f"loss {row['last_loss']:.4f}, exact {exact} of {N_EXAMPLES}, {row['cpu_seconds']} s"
                print(f"{recipe} {model} seed {seed}: {line}", flush=True)


if __name__ == "__main__":
    main()
