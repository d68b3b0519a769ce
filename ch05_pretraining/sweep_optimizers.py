"""Compare optimizers at equal processor time on tales and record the losses in `sweep_optimizers.csv`.

    python sweep_optimizers.py --measure                       time a step of each: `sweep_optimizers_steps.csv`
    python sweep_optimizers.py --search                        learning rates of each, on the search's own seed
    python sweep_optimizers.py                                 the best rate of each, three other seeds
    python sweep_optimizers.py --optimizer muon --seeds 1      only some
    python sweep_optimizers.py --optimizer muon --whole-qkv    Muon with queries, keys and values as one matrix
    python sweep_optimizers.py --short --seeds 0               the best rates, 50 steps

Equal time is a number of steps: `--measure` takes steps of all optimizers in turn and divides `SECONDS` by what one
takes. The other runs read the record and look at no clock. A run replaces the row of the same optimizer, rate and seed.
The model has 2 blocks of width 64; stories are seen once. One thread is used; on another processor the last decimals
differ.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from shared.model.gpt import GPTConfig, GPTModel
from shared.notebook.records import replace_rows
from shared.pretraining.processes import cpu_name
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator
from shared.training.optimizers import build_optimizers, set_learning_rates
from shared.training.schedules import build_schedule

RESULTS = Path(__file__).resolve().parent / "sweep_optimizers.csv"
STEPS = RESULTS.with_name("sweep_optimizers_steps.csv")
SECONDS = 15  # of one thread, for the updates of one run
BATCH = 8  # stories
N_VALIDATION, VALIDATION_SEED = 300, 999
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
SHORT_STEPS = 50  # of the runs that the notebook repeats
IGNORED = -100
# Half-decades or finer around the rate that each paper advises; Muon's are those of its matrices.
RATES = {
    "sgd": (0.03, 0.1, 0.3, 1.0, 3.0),
    "adam": (3e-3, 6e-3, 1.2e-2, 2.5e-2),
    "adamw": (3e-3, 6e-3, 1.2e-2),
    "lion": (3e-4, 1e-3, 3e-3, 1e-2),
    "muon": (0.01, 0.02, 0.04, 0.08),
}
MUON_VECTOR_RATE = 6e-3  # of AdamW for the embedding and the norms, beside Muon
COLUMNS = [
    *(
        "role",
        "optimizer",
        "learning_rate",
        "seed",
        "parameters",
        "steps",
        "stories",
        "tokens",
        "loss_per_story",
    ),
    *("floor", "cpu_seconds", "hardware", "torch"),
]
STEP_COLUMNS = ["optimizer", "milliseconds_per_step", "hardware", "torch"]


@dataclass(frozen=True)
class Outcome:
    """A finished run: model, training loss at each step, loss per validation story and its floor, in nats."""

    model: GPTModel
    losses: list[float]
    loss_per_story: float
    floor: float
    tokens: int
    cpu_seconds: float


def story_rows(seed: int, n: int) -> tuple[list[np.ndarray], float]:
    """Return `n` stories as ids, framed by the end-of-text token, and the mean of -log p over them in nats."""
    encoding = tale_encoding()
    end, stories = encoding.eot_token, list(TaleGenerator(seed).stories(n))
    rows = [np.array([end, *encoding.encode_ordinary(story.text), end]) for story in stories]
    return rows, -sum(story.log_probability for story in stories) / n


def collate(rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Pad rows to one length: inputs and targets (rows, longest - 1), targets after a row's end are IGNORED."""
    longest = max(map(len, rows))
    inputs, targets = np.zeros((len(rows), longest - 1), np.int64), np.full((len(rows), longest - 1), IGNORED)
    for i, row in enumerate(rows):
        inputs[i, : len(row) - 1], targets[i, : len(row) - 1] = row[:-1], row[1:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def story_batches(rows: list[np.ndarray], batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of rows of similar length, in random order, each row once."""
    generator = np.random.default_rng(seed)
    for start in range(0, len(rows) - batch + 1, 8 * batch):
        window = sorted(rows[start : start + 8 * batch], key=len)
        groups = [window[i : i + batch] for i in range(0, len(window) - batch + 1, batch)]
        for i in generator.permutation(len(groups)):
            yield collate(groups[i])


def story_loss(model: nn.Module, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the loss of the targets that count, in nats."""
    return F.cross_entropy(
        model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )


@torch.no_grad()
def loss_per_story(model: nn.Module, rows: list[np.ndarray], batch: int = 50) -> float:
    """Return the mean over stories of -log p of the whole story, in nats."""
    ordered = sorted(rows, key=len)
    batches = [collate(ordered[i : i + batch]) for i in range(0, len(rows), batch)]
    return sum(story_loss(model, *pair, reduction="sum").item() for pair in batches) / len(rows)


def optimizers_of(model: nn.Module, name: str, rate: float, whole_qkv: bool = False) -> list:
    """Return the optimizers called `name` with their peak rate; for Muon it is that of the matrices."""
    if name != "muon":
        return build_optimizers(model, name, rate)
    built = build_optimizers(model, name, MUON_VECTOR_RATE, matrix_learning_rate=rate)
    if whole_qkv:
        for group in built[0].param_groups:
            group["split"] = None
    return built


def train(
    config: GPTConfig,
    seed: int,
    n_steps: int,
    batch: int,
    build: Callable[[nn.Module], list],
    *,
    clip: float = 1.0,
    validation: int = N_VALIDATION,
) -> Outcome:
    """Train a model for `n_steps` on stories seen once, warm-up of a tenth and linear decay of half; evaluate it."""
    torch.manual_seed(seed)
    model = GPTModel(config)
    optimizers = build(model)
    rows, _ = story_rows(seed + 1, n_steps * batch)
    schedule = build_schedule("wsd", n_steps, n_steps // 10, decay=0.5)
    losses, tokens, started = [], 0, time.process_time()
    progress = tqdm(story_batches(rows, batch, seed), total=n_steps, leave=False)
    for step, (inputs, targets) in enumerate(progress):
        set_learning_rates(optimizers, schedule(step + 1))
        loss = story_loss(model, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        tokens += int((targets != IGNORED).sum())
    seconds = time.process_time() - started
    checked, floor = story_rows(VALIDATION_SEED, validation)
    return Outcome(model, losses, loss_per_story(model.eval(), checked), floor, tokens, seconds)


def small_config() -> GPTConfig:
    """Return the model of the comparison: 2 blocks of width 64."""
    return GPTConfig.preset("tales-1m", emb_dim=64, n_layers=2, qk_norm=True)


def run(name: str, rate: float, seed: int, n_steps: int | None = None, whole_qkv: bool = False) -> Outcome:
    """Train by one optimizer with one rate; the number of steps is the recorded one unless given.

    Raises:
        ValueError: The optimizer is unknown, or its steps are not recorded.
    """
    if name not in RATES:
        raise ValueError(f"name must be one of {', '.join(RATES)}, got {name!r}")
    build = lambda model: optimizers_of(model, name, rate, whole_qkv)
    return train(small_config(), seed, n_steps or recorded_steps()[name], BATCH, build)


def recorded_steps() -> dict[str, int]:
    """Return the number of steps of each optimizer that take `SECONDS`; ValueError if they were not measured."""
    if not STEPS.exists():
        raise ValueError(f"{STEPS.name} is missing: run with --measure first")
    return {
        row["optimizer"]: round(1000 * SECONDS / float(row["milliseconds_per_step"])) for row in read(STEPS)
    }


def measure(rounds: int = 12, steps_a_round: int = 3) -> None:
    """Time a step of each optimizer, all in turn, and record how many fit into `SECONDS`."""
    rows, _ = story_rows(1, BATCH * steps_a_round * (rounds + 1))
    batches = list(story_batches(rows, BATCH, 0))
    models = {name: GPTModel(small_config()) for name in RATES}
    built = {name: optimizers_of(model, name, RATES[name][0]) for name, model in models.items()}
    seconds = {name: [] for name in RATES}
    for turn in range(rounds + 1):  # the first round warms up
        for name, model in models.items():
            started = time.process_time()
            for inputs, targets in batches[turn * steps_a_round : (turn + 1) * steps_a_round]:
                story_loss(model, inputs, targets).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in built[name]:
                    optimizer.step()
                    optimizer.zero_grad()
            seconds[name].append((time.process_time() - started) / steps_a_round)
    medians = {name: float(np.median(values[1:])) for name, values in seconds.items()}
    shared = {"hardware": f"{cpu_name()}, 1 thread", "torch": torch.__version__}
    for name, median in medians.items():
        row = {"optimizer": name, "milliseconds_per_step": round(1000 * median, 1)}
        print(row, flush=True)
        save(row | shared, STEPS, STEP_COLUMNS, ("optimizer",))


def best_rates() -> dict[str, float]:
    """Return for each optimizer the learning rate with the lowest loss in the recorded search."""
    found: dict[str, tuple[float, float]] = {}
    for row in read(RESULTS):
        if row["role"] == "search":
            entry = float(row["loss_per_story"]), float(row["learning_rate"])
            found[row["optimizer"]] = min(found.get(row["optimizer"], entry), entry)
    return {name: rate for name, (_, rate) in found.items()}


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a record, none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def save(row: dict[str, object], path: Path, columns: list[str], key: tuple[str, ...]) -> None:
    """Write a row to a record atomically; it replaces the row with the same values of `key`."""
    identity = lambda entry: tuple(str(entry[name]) for name in key)
    replace_rows(path, columns, [row], identity)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="time the steps and record their number")
    parser.add_argument("--search", action="store_true", help="try learning rates on the search's seed")
    parser.add_argument("--optimizer", nargs="+", choices=RATES, default=list(RATES), help="default: all")
    parser.add_argument("--rate", nargs="+", type=float, help="default: those of the search, or its best")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the record")
    parser.add_argument("--short", action="store_true", help=f"{SHORT_STEPS} steps only")
    parser.add_argument("--whole-qkv", action="store_true", help="Muon does not split queries, keys, values")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        measure()
        return
    role = "search" if options.search else "whole-qkv" if options.whole_qkv else "compared"
    if options.short:
        role = "short"
    for name in options.optimizer:
        rates = options.rate or (RATES[name] if options.search else [best_rates()[name]])
        seeds = options.seeds or ((SEARCH_SEED,) if options.search else SEEDS)
        for rate in rates:
            for seed in seeds:
                done = run(name, rate, seed, SHORT_STEPS if options.short else None, options.whole_qkv)
                row = {
                    "role": role,
                    "optimizer": name,
                    "learning_rate": rate,
                    "seed": seed,
                    "parameters": done.model.n_parameters,
                    "steps": len(done.losses),
                    "stories": len(done.losses) * BATCH,
                    "tokens": done.tokens,
                    "loss_per_story": round(done.loss_per_story, 4),
                    "floor": round(done.floor, 4),
                    "cpu_seconds": round(done.cpu_seconds, 1),
                    "hardware": f"{cpu_name()}, 1 thread",
                    "torch": torch.__version__,
                }
                save(row, RESULTS, COLUMNS, ("role", "optimizer", "learning_rate", "seed"))
                loss, seconds = row["loss_per_story"], row["cpu_seconds"]
                print(
                    f"{role} {name} rate {rate:g} seed {seed}: {loss} of {row['floor']}, {seconds} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
