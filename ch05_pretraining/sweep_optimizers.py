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
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from shared.model.gpt import GPTConfig, GPTModel
from shared.notebook.records import read_rows, replace_row
from shared.notebook.tale_runs import Outcome, story_rows, train_on_tales
from shared.pretraining.processes import cpu_name
from shared.training.batches import row_batches
from shared.training.loop import train
from shared.training.optimizers import build_optimizers

RESULTS = Path(__file__).resolve().parent / "sweep_optimizers.csv"
STEPS = RESULTS.with_name("sweep_optimizers_steps.csv")
SECONDS = 15  # of one thread, for the updates of one run
BATCH = 8  # stories
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
SHORT_STEPS = 50  # of the runs that the notebook repeats
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
    "role",
    "optimizer",
    "learning_rate",
    "seed",
    "parameters",
    "steps",
    "stories",
    "tokens",
    "loss_per_story",
    "floor",
    "cpu_seconds",
    "hardware",
    "torch",
]
STEP_COLUMNS = ["optimizer", "milliseconds_per_step", "hardware", "torch"]


def optimizers_of(model: nn.Module, name: str, rate: float, whole_qkv: bool = False) -> list:
    """Return the optimizers called `name` with their peak rate; for Muon it is that of the matrices."""
    if name != "muon":
        return build_optimizers(model, name, rate)
    built = build_optimizers(model, name, MUON_VECTOR_RATE, matrix_learning_rate=rate)
    if whole_qkv:
        for group in built[0].param_groups:
            group["split"] = None
    return built


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
    return train_on_tales(small_config(), seed, n_steps or recorded_steps()[name], BATCH, build)


def recorded_steps() -> dict[str, int]:
    """Return the number of steps of each optimizer that take `SECONDS`; ValueError if they were not measured."""
    if not STEPS.exists():
        raise ValueError(f"{STEPS.name} is missing: run with --measure first")
    return {
        row["optimizer"]: round(1000 * SECONDS / float(row["milliseconds_per_step"]))
        for row in read_rows(STEPS)
    }


def measure(rounds: int = 12, steps_a_round: int = 3) -> None:
    """Time a step of each optimizer, all in turn, and record how many fit into `SECONDS`."""
    rows, _ = story_rows(1, BATCH * steps_a_round * (rounds + 1))
    batches = list(row_batches(rows, BATCH))
    models = {name: GPTModel(small_config()) for name in RATES}
    built = {name: optimizers_of(model, name, RATES[name][0]) for name, model in models.items()}
    seconds = {name: [] for name in RATES}
    for turn in range(rounds + 1):  # the first round warms up
        for name, model in models.items():
            started = time.process_time()
            part = batches[turn * steps_a_round : (turn + 1) * steps_a_round]
            train(model, part, built[name], n_steps=steps_a_round)
            seconds[name].append((time.process_time() - started) / steps_a_round)
    medians = {name: float(np.median(values[1:])) for name, values in seconds.items()}
    shared = {"hardware": f"{cpu_name()}, 1 thread", "torch": torch.__version__}
    for name, median in medians.items():
        row = {"optimizer": name, "milliseconds_per_step": round(1000 * median, 1)}
        print(row, flush=True)
        replace_row(STEPS, STEP_COLUMNS, row | shared, ("optimizer",))


def best_rates() -> dict[str, float]:
    """Return for each optimizer the learning rate with the lowest loss in the recorded search."""
    found: dict[str, tuple[float, float]] = {}
    for row in read_rows(RESULTS):
        if row["role"] == "search":
            entry = float(row["loss_per_story"]), float(row["learning_rate"])
            found[row["optimizer"]] = min(found.get(row["optimizer"], entry), entry)
    return {name: rate for name, (_, rate) in found.items()}


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
                replace_row(RESULTS, COLUMNS, row, ("role", "optimizer", "learning_rate", "seed"))
                loss, seconds = row["loss_per_story"], row["cpu_seconds"]
                print(
                    f"{role} {name} rate {rate:g} seed {seed}: {loss} of {row['floor']}, {seconds} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
