"""Train variants of a small GPT on tales, at equal tokens and at equal time, and record them in `ablate_variants.csv`.

    python ablate_variants.py --measure                      time of a step of every variant: `ablate_variants_time.csv`
    python ablate_variants.py                                every variant, seeds 0 to 2, long and short recipe
    python ablate_variants.py --variant gpt2 llama --seeds 0 --recipe short

Every variant sees the same stories in the same order. The learning rate rises in a short warm-up, stays constant,
and falls linearly to 0 in the last quarter. So one run serves two budgets: from the constant part a copy branches off
for each of them and is cooled down on its own. "equal-tokens" gives every variant `steps` steps; "equal-time" gives it
as many as take the time of the baseline's `steps`, by the recorded measurement. No clock decides anything in a run. A
run replaces the rows of the same recipe, variant and seed. One thread; on another processor the last decimals differ.
"""

import argparse
import copy
import csv
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from shared.model.gpt import GPTConfig, GPTModel
from shared.model.layers import MixtureOfExperts, balance_loss
from shared.notebook.records import replace_rows
from shared.pretraining.processes import cpu_name
from shared.tales.encoding import tale_encoding
from shared.tales.generator import Story, TaleGenerator
from shared.training.batches import Batch, document_row, pad_rows
from shared.training.loop import train
from shared.training.losses import next_token_loss

RESULTS = Path(__file__).resolve().parent / "ablate_variants.csv"
CURVES, TIMES = RESULTS.with_stem("ablate_variants_curves"), RESULTS.with_stem("ablate_variants_time")
BATCH = 2  # stories of a step
LEARNING_RATE = 6e-3
WARMUP, COOLDOWN = 60, 0.25  # steps of rising learning rate, share of the steps in which it falls
BALANCE = 0.01  # factor of the balance loss
VALIDATION_SEED, N_VALIDATION, TRAINING_SEED = 4_000_000, 256, 4_000_001
WATCH = 50  # steps that a point of a curve is the mean of

SHAPE = {
    "vocab_size": 2048,
    "context_length": 256,
    "emb_dim": 64,
    "n_heads": 4,
    "n_layers": 2,
    "dropout": 0.0,
}
# GPT-2's 0.02 belongs to a width of 768; 0.02 * sqrt(768 / 64) is 0.07. In a trial, 0.02 at a width of 64 learned more
# slowly, and seeds differed more than variants.
BASE = GPTConfig(**SHAPE, init_std=0.07)
RMS, ROTARY, SWIGLU = {"norm": "rmsnorm"}, {"positions": "rotary"}, {"feed_forward": "swiglu"}
NO_BIAS, GQA = {"bias": False, "qkv_bias": False}, {"n_kv_heads": 2}
QK_NORM, WINDOW = {"qk_norm": True}, {"window": 32}
LLAMA = {**RMS, **ROTARY, **SWIGLU, **NO_BIAS}
QWEN = {**LLAMA, **GQA, **QK_NORM}
# Two of four experts are active, each half as wide as the SwiGLU they replace (176).
MOE = {"feed_forward": "moe", "feed_forward_dim": 88, "n_experts": 4, "n_active_experts": 2}
VARIANTS: dict[str, dict[str, object]] = {
    "gpt2": {},
    # One change of the baseline at a time.
    "gpt2, RMSNorm": RMS,
    "gpt2, rotary": ROTARY,
    "gpt2, no positions": {"positions": "none"},
    "gpt2, SwiGLU": SWIGLU,
    "gpt2, no biases": NO_BIAS,
    "gpt2, GQA": GQA,
    "gpt2, QK norm": QK_NORM,
    "gpt2, window": WINDOW,
    # The way to the Llama family: each keeps the changes of those above it ("gpt2, RMSNorm" is the first step).
    "RMSNorm, rotary": {**RMS, **ROTARY},
    "RMSNorm, rotary, SwiGLU": {**RMS, **ROTARY, **SWIGLU},
    "llama": LLAMA,
    "llama, GQA": {**LLAMA, **GQA},
    "qwen3": QWEN,
    # Each starts from "qwen3".
    "qwen3, window": {**QWEN, **WINDOW},
    "qwen3, MoE": {**QWEN, **MOE},
    "qwen3, MoE unbalanced": {**QWEN, **MOE},
}
SEEDS = (0, 1, 2)
SHORT = ("gpt2", "llama")  # what the notebook trains as well
COLUMNS = [
    *("recipe", "variant", "seed", "parameters", "steps", "stories", "tokens", "learning_rate"),
    *("validation_loss", "floor", "training_loss", "largest_load", "cpu_seconds", "hardware", "torch"),
]
CURVE_COLUMNS = ["variant", "seed", "step", "training_loss"]
TIME_COLUMNS = ["variant", "ms_per_step", "ratio", "ratio_low", "ratio_high", "rounds", "hardware", "torch"]


@dataclass(frozen=True)
class Recipe:
    """How long a variant is trained.

    Attributes:
        steps: Updates of the weights at equal tokens.
        equal_time: Whether the run branches off for equal time too.
    """

    steps: int
    equal_time: bool


RECIPES = {"long": Recipe(steps=1000, equal_time=True), "short": Recipe(steps=300, equal_time=False)}


def story_batch(stories: Iterable[Story]) -> Batch:
    """Return whole stories, framed by end tokens, as one batch; a shorter story's last end token is read too."""
    encoding = tale_encoding()
    rows = [document_row(story.text, encoding) for story in stories]
    inputs, targets = pad_rows(rows)
    # Nothing is predicted after that token, but experts count it: the recorded loads and balance losses include it.
    for row, padded in zip(rows, inputs, strict=True):
        padded[len(row) - 1 : len(row)] = row[-1]
    return inputs, targets


def story_losses(model: GPTModel, batch: Batch) -> Tensor:
    """Return minus the log-probability of each target, (stories, tokens), 0 where a story is over."""
    inputs, targets = batch
    return next_token_loss(model(inputs), targets, reduction="none")


def validation_stories() -> list[Story]:
    """Return the stories that every variant is judged by; no training seed makes them."""
    return list(TaleGenerator(VALIDATION_SEED).stories(N_VALIDATION))


@torch.no_grad()
def validate(model: GPTModel) -> tuple[float, float]:
    """Return the loss in nats per story, and the largest share of an expert in a layer (0.0 without experts)."""
    model.eval()
    inputs, targets = story_batch(validation_stories())
    losses, loads = [], []
    for part in zip(inputs.split(32), targets.split(32), strict=True):
        losses.append(story_losses(model, part).sum(dim=1))
        loads.append([m.load for m in model.modules() if isinstance(m, MixtureOfExperts)])
    model.train()
    shares = [torch.stack(layer).mean(dim=0).max().item() for layer in zip(*loads, strict=True)]
    return torch.cat(losses).mean().item(), max(shares, default=0.0)


class Training:
    """A model in training: its optimizer, what it saw, its losses in nats per story."""

    def __init__(self, variant: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = GPTModel(replace(BASE, **VARIANTS[variant])).train()
        balanced = self.model.config.feed_forward == "moe" and "unbalanced" not in variant
        self.balance = BALANCE if balanced else 0.0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, (0.9, 0.95), fused=True)
        self.steps, self.tokens, self.losses, self.cpu_seconds = 0, 0, [], 0.0

    def advance(self, batches: Sequence[Batch], end: int, share: Callable[[int], float]) -> None:
        """Train until `end` updates are done; update k + 1 reads batch k, at this share of the peak learning rate."""
        if self.steps == end:
            return
        started = time.process_time()
        log = train(
            self.model,
            batches[self.steps : end],
            self.optimizer,
            n_steps=end,
            start_step=self.steps,
            schedule=share,
            auxiliary_loss=(lambda model: self.balance * balance_loss(model)) if self.balance else None,
        )
        self.cpu_seconds += time.process_time() - started
        for before, now in pairwise(log):
            self.losses.append(now.loss * (now.tokens - before.tokens) / BATCH)
        self.steps, self.tokens = end, self.tokens + log[-1].tokens

    def branch(self) -> "Training":
        """Return a copy that can be trained on without changing this one."""
        other = copy.copy(self)
        other.model, other.losses = copy.deepcopy(self.model), list(self.losses)
        other.optimizer = torch.optim.AdamW(other.model.parameters(), fused=True)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other


def train_variant(variant: str, seed: int, ends: list[int]) -> list[Training]:
    """Train a variant and return it cooled down at each number of steps of `ends`, which rise."""
    batches = training_batches(seed, max(ends))
    trunk, results = Training(variant, seed), []
    for end in ends:
        start = end - round(COOLDOWN * end)
        trunk.advance(batches, start, lambda step: min(1.0, (step + 1) / WARMUP))
        results.append(trunk.branch())
        results[-1].advance(batches, end, lambda step, start=start, end=end: (end - step) / (end - start))
    return results


def training_batches(seed: int, n_steps: int) -> list[Batch]:
    """Return the first `n_steps` batches of `BATCH` stories of a seed."""
    stories = TaleGenerator(TRAINING_SEED + seed)
    return [story_batch(stories.stories(BATCH)) for _ in range(n_steps)]


def equal_time_steps(variant: str, steps: int) -> int:
    """Return how many steps of a variant take as long as `steps` of the baseline, by the recorded measurement."""
    with TIMES.open(encoding="utf-8", newline="") as file:
        ratios = {row["variant"]: float(row["ratio"]) for row in csv.DictReader(file)}
    return round(steps / ratios[variant])


def run(variant: str, seed: int, recipe: str) -> list[dict[str, object]]:
    """Train one variant by a recipe and return its rows of the record."""
    steps = RECIPES[recipe].steps
    budgets = {"short" if recipe == "short" else "equal-tokens": steps}
    if RECIPES[recipe].equal_time:
        budgets["equal-time"] = equal_time_steps(variant, steps)
    ends = sorted(set(budgets.values()))
    trained = dict(zip(ends, train_variant(variant, seed, ends), strict=True))
    floor = -statistics.fmean(story.log_probability for story in validation_stories())
    found = []
    for name, end in budgets.items():
        result = trained[end]
        loss, load = validate(result.model)
        budget = {
            "steps": end,
            "stories": end * BATCH,
            "tokens": result.tokens,
            "learning_rate": LEARNING_RATE,
        }
        measured = {"validation_loss": loss, "floor": floor, "largest_load": load}
        measured["training_loss"] = statistics.fmean(result.losses[-WATCH:])
        found.append(
            {
                **{"recipe": name, "variant": variant, "seed": seed, "parameters": result.model.n_parameters},
                **budget,
                **{key: f"{value:.4f}" for key, value in measured.items()},
                **{"cpu_seconds": f"{result.cpu_seconds:.1f}", **machine()},
            }
        )
    if recipe == "long":
        losses = trained[steps].losses
        points = [
            {
                **{"variant": variant, "seed": seed, "step": end},
                "training_loss": f"{statistics.fmean(losses[end - WATCH : end]):.4f}",
            }
            for end in range(WATCH, steps + 1, WATCH)
        ]
        replace_rows(
            CURVES, CURVE_COLUMNS, points, lambda row: (row["variant"], int(row["seed"]), int(row["step"]))
        )
    return found


def measure(rounds: int = 9, steps: int = 20) -> list[dict[str, object]]:
    """Time a step of every variant in alternating runs: the variants take turns, `rounds` times `steps` steps each."""
    batches = training_batches(99, steps)
    trainings = {name: Training(name, 0) for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(rounds + 1):
        for name, training in trainings.items():
            before = training.cpu_seconds
            training.steps = 0
            training.advance(batches, steps, lambda step: 0.0)
            if number:  # the first round only warms up
                times[name].append((training.cpu_seconds - before) / steps)
    found = []
    for name, own in times.items():
        ratios = sorted(mine / base for mine, base in zip(own, times["gpt2"], strict=True))
        found.append(
            {
                **{"variant": name, "ms_per_step": f"{1000 * statistics.median(own):.2f}"},
                "ratio": f"{statistics.median(ratios):.3f}",
                **{
                    "ratio_low": f"{ratios[0]:.3f}",
                    "ratio_high": f"{ratios[-1]:.3f}",
                    "rounds": rounds,
                    **machine(),
                },
            }
        )
    return found


def machine() -> dict[str, str]:
    """Return the processor's name and torch's version."""
    return {"hardware": f"{cpu_name()}, 1 thread", "torch": torch.__version__.split("+")[0]}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all of them"
    )
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: both")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--measure", action="store_true", help="time the steps instead of training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        replace_rows(TIMES, TIME_COLUMNS, measure(), lambda row: list(VARIANTS).index(row["variant"]))
        return
    for recipe in options.recipe:
        for seed in options.seeds:
            for variant in options.variant:
                if recipe == "short" and (variant not in SHORT or seed != SEEDS[0]):
                    continue
                found = run(variant, seed, recipe)
                replace_rows(
                    RESULTS, COLUMNS, found, lambda row: (row["recipe"], row["variant"], int(row["seed"]))
                )
                for row in found:
                    shown = ("recipe", "variant", "seed", "steps", "validation_loss", "floor", "cpu_seconds")
                    print(*(f"{name} {row[name]}" for name in shown), sep=", ", flush=True)


if __name__ == "__main__":
    main()
