"""The longer runs of `09_troubleshooting.ipynb`: cures for overfitting and for poor text, three seeds each.

    python ch05_pretraining/sweep_troubleshooting.py                       everything, about 8 minutes of one core
    python ch05_pretraining/sweep_troubleshooting.py --part overfitting    one part; --variant and --seeds choose runs

Each run replaces its own rows in `sweep_troubleshooting_overfitting.csv` (losses every 25 steps) or
`sweep_troubleshooting_text.csv` (loss per story, grades of generated texts). The notebook imports this file, draws the
record, and repeats a part of it. One thread is used; on another processor the last decimals differ.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch

from shared.data.corpus import load_stories
from shared.generation.engine import generate
from shared.model.gpt import GPTConfig, GPTModel
from shared.notebook.records import replace_rows
from shared.pretraining.processes import cpu_name
from shared.tales.encoding import tale_encoding
from shared.tales.generator import Story, TaleGenerator, plans
from shared.tales.scoring import score
from shared.text.dataset import join_documents, ngram_overlap
from shared.training.batches import Batch, document_row, pad_rows, shuffled_rows
from shared.training.loop import Record, train
from shared.training.losses import evaluate, loss_per_document
from shared.training.optimizers import build_optimizers
from shared.training.schedules import linear

HERE = Path(__file__).resolve().parent
OVERFITTING_FILE = HERE / "sweep_troubleshooting_overfitting.csv"
TEXT_FILE = HERE / "sweep_troubleshooting_text.csv"
SEEDS = (0, 1, 2)
BATCH_SIZE = 8

# Overfitting: the prose of stories.txt in windows.
WINDOW = 64
PROSE_STEPS = 300
PROSE_EVERY = 25
PROSE_LEARNING_RATE = 3e-3

# Poor text: tales of two of the plans, so that a small model gets somewhere in a quarter of a minute.
TALE_PLANS = 2
TALE_STEPS = 300
TALE_LEARNING_RATE = 6e-3
N_VALIDATION = 100
N_TEXTS = 48
RECITED = 30  # tokens in a row that occur in the training stories count as recited
TEMPERATURES = (1.0, 0.5)


@dataclass(frozen=True)
class Prose:
    """A variant of the overfitting run: how many stories of the bundled prose are read, and what is done about it."""

    n_stories: int = 2
    dropout: float = 0.0
    weight_decay: float = 0.01
    emb_dim: int = 64


@dataclass(frozen=True)
class Tales:
    """A variant of the poor-text run: number of different training stories and width of the model."""

    n_stories: int = TALE_STEPS * BATCH_SIZE
    emb_dim: int = 64


OVERFITTING = {
    "2 stories": Prose(),
    "5 stories": Prose(n_stories=5),
    "10 stories": Prose(n_stories=10),
    "dropout 0.3": Prose(dropout=0.3),
    "weight decay 3": Prose(weight_decay=3.0),
    "half the width": Prose(emb_dim=32),
    "10 stories, dropout 0.3": Prose(n_stories=10, dropout=0.3),
}
TEXT = {
    "20 stories": Tales(n_stories=20),
    "100 stories": Tales(n_stories=100),
    "2,400 stories": Tales(),
    "2,400 stories, width 16": Tales(emb_dim=16),
    "2,400 stories, width 32": Tales(emb_dim=32),
}


def small_config(emb_dim: int, dropout: float = 0.0) -> GPTConfig:
    """Return the shape of all models here: two blocks, four heads, otherwise as `tales-1m`."""
    return GPTConfig.preset("tales-1m", emb_dim=emb_dim, n_layers=2, dropout=dropout)


def batches(rows: Sequence[Sequence[int]], seed: int, batch_size: int = BATCH_SIZE) -> Iterator[Batch]:
    """Yield batches without end, the rows in a new random order in each epoch."""
    drawn = shuffled_rows(rows, seed=seed)
    while True:
        yield pad_rows(list(islice(drawn, batch_size)))


@cache
def prose_windows(split: str, n_stories: int | None = None) -> list[list[int]]:
    """Return the first `n_stories` stories of a split as windows of `WINDOW` + 1 ids, side by side."""
    encoding = tale_encoding()
    texts = [story.text for story in load_stories(split)[:n_stories]]
    ids = join_documents(texts, encoding.encode_ordinary, encoding.eot_token)
    return [ids[i : i + WINDOW + 1].tolist() for i in range(0, len(ids) - WINDOW, WINDOW)]


def prose_loss(model: GPTModel, split: str, n_stories: int | None = None) -> float:
    """Return the loss in nats per token on at most 48 windows of a split."""
    windows = prose_windows(split, n_stories)[:48]
    return evaluate(model, [pad_rows(windows)]).loss


def train_on_prose(
    variant: Prose, seed: int, n_steps: int = PROSE_STEPS
) -> tuple[GPTModel, list[dict[str, float]]]:
    """Train a model on prose; return it, and its training and validation loss every `PROSE_EVERY` steps."""
    torch.manual_seed(seed)
    model = GPTModel(small_config(variant.emb_dim, variant.dropout))
    optimizers = build_optimizers(model, "adamw", PROSE_LEARNING_RATE, weight_decay=variant.weight_decay)
    curve = []

    def watch(step: int) -> float:
        training = prose_loss(model, "train", variant.n_stories)
        curve.append({"step": step, "training": training, "validation": prose_loss(model, "validation")})
        return curve[-1]["validation"]

    source = batches(prose_windows("train", variant.n_stories), seed)
    train(model, source, optimizers, n_steps=n_steps, evaluate_every=PROSE_EVERY, on_evaluate=watch)
    return model, curve


@cache
def tales(seed: int, n: int, n_plans: int = TALE_PLANS) -> list[Story]:
    """Return the first `n` stories of `TaleGenerator(seed)` whose plan is among the first `n_plans`."""
    drawn, names = TaleGenerator(seed), plans()[:n_plans]
    every = iter(drawn.sample, None)
    return list(islice((story for story in every if story.plan in names), n))


def tale_rows(stories: Sequence[Story], n_tokens: int | None = None) -> list[list[int]]:
    """Return stories as training rows; at most `n_tokens` targets of each."""
    encoding = tale_encoding()
    return [document_row(story.text, encoding)[: n_tokens and n_tokens + 1] for story in stories]


def train_on_tales(variant: Tales, seed: int, n_steps: int = TALE_STEPS) -> tuple[GPTModel, list[Record]]:
    """Train a model on whole tales with Muon; return it and the log of `train`."""
    torch.manual_seed(seed)
    model = GPTModel(small_config(variant.emb_dim))
    optimizers = build_optimizers(model, "muon", TALE_LEARNING_RATE)
    source = batches(tale_rows(tales(0, variant.n_stories)), seed)
    schedule = lambda step: linear(step, n_steps, 20)
    return model, train(model, source, optimizers, n_steps=n_steps, schedule=schedule)


def write_tales(model: GPTModel, n: int = N_TEXTS, seed: int = 0, **options: object) -> list[str]:
    """Return `n` texts that the model writes from the start of a story; the options go to `generate`."""
    encoding = tale_encoding()
    prompts = [[encoding.eot_token]] * n
    rows = generate(model, prompts, 240, stop_tokens=(encoding.eot_token,), seed=seed, **options)
    return [encoding.decode([token for token in row if token != encoding.eot_token]) for row in rows]


def grade(texts: Sequence[str]) -> dict[str, float]:
    """Return the grades of texts: whole stories, right sentences, agreements, different texts; each from 0 to 1.

    Agreements are the mean over pronouns, names, objects and consequences, each the mean over the texts where
    there was something to judge.
    """
    scores = [score(text) for text in texts if text.strip()]
    kinds = ("pronouns", "names", "objects", "consequences")
    judged = [[value for s in scores if (value := getattr(s, kind)) is not None] for kind in kinds]
    return {
        "stories": sum(s.story for s in scores) / len(texts),
        "sentences": sum(s.sentences for s in scores) / len(texts),
        "agreements": fmean(fmean(values) for values in judged if values) if any(judged) else 0.0,
        "different": len(set(texts)) / len(texts),
    }


def recited(texts: Sequence[str], training: Sequence[Sequence[int]]) -> float:
    """Return the share of the sequences of `RECITED` tokens in `texts` that also occur in the training rows."""
    written = [tale_encoding().encode_ordinary(text) for text in texts]
    return ngram_overlap(training, written, RECITED)


def run_overfitting(name: str, seed: int) -> list[dict[str, object]]:
    """Return the rows of the record of one overfitting run."""
    started = time.process_time()
    model, curve = train_on_prose(OVERFITTING[name], seed)
    facts = _facts(name, OVERFITTING[name], seed, model, started)
    return [facts | {key: round(value, 5) for key, value in point.items()} for point in curve]


def run_text(name: str, seed: int) -> list[dict[str, object]]:
    """Return the rows of the record of one poor-text run, one for each temperature."""
    started = time.process_time()
    model, log = train_on_tales(TEXT[name], seed)
    facts = _facts(name, TEXT[name], seed, model, started)
    facts["steps"] = TALE_STEPS
    facts["tokens"] = log[-1].tokens
    training = tale_rows(tales(0, TEXT[name].n_stories))
    facts["training"] = round(loss_per_document(model, training[:40]), 4)
    facts["validation"] = round(loss_per_document(model, tale_rows(tales(1, N_VALIDATION))), 4)
    rows = []
    for temperature in TEMPERATURES:
        texts = write_tales(model, temperature=temperature)
        grades = grade(texts) | {"recited": recited(texts, training)}
        rows.append(
            facts | {"temperature": temperature} | {key: round(value, 4) for key, value in grades.items()}
        )
    return rows


def _facts(
    name: str, variant: Prose | Tales, seed: int, model: GPTModel, started: float
) -> dict[str, object]:
    seconds = round(time.process_time() - started, 1)
    known = {"variant": name, "seed": seed, **asdict(variant), "parameters": model.n_parameters}
    return known | {
        "cpu_seconds": seconds,
        "hardware": f"{cpu_name()}, 1 thread",
        "torch": torch.__version__,
    }


def save(path: Path, new: list[dict[str, object]], order: Sequence[str]) -> None:
    """Write rows to the record atomically; they replace those of the same variant and seed."""
    key = lambda row: (order.index(row["variant"]), int(row["seed"]))
    replace_rows(path, list(new[0]), new, key)


PARTS = {
    "overfitting": (OVERFITTING, run_overfitting, OVERFITTING_FILE),
    "text": (TEXT, run_text, TEXT_FILE),
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: both")
    parser.add_argument("--variant", nargs="+", help="names of variants; default: all of the part")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="default: 0 1 2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = [name for part in options.part for name in PARTS[part][0]]
    if unknown := set(options.variant or ()) - set(known):
        parser.error(f"--variant must be among {', '.join(known)}; got {', '.join(sorted(unknown))}")
    for part in options.part:
        variants, run, path = PARTS[part]
        for name in variants:
            for seed in options.seeds if name in (options.variant or known) else ():
                rows = run(name, seed)
                save(path, rows, list(variants))
                last = {key: rows[-1][key] for key in ("training", "validation", "cpu_seconds")}
                print(f"{part}, {name}, seed {seed}: {last}", flush=True)


if __name__ == "__main__":
    main()
