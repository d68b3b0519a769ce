"""Pretrain a small BERT on tales, with its comparisons, tune it on the bundled messages, and record what came of it.

    python pretrain_bert.py --device cuda --output out      everything; a run that is done is not done again
    python pretrain_bert.py --steps 30 --quick --output out  a trial of a minute or two on a CPU
    python pretrain_bert.py --ship full --device cpu --output out     the shipped model, on one thread
    python pretrain_bert.py --messages shipped --output out           tune it on the messages, five folds
    python pretrain_bert.py --collect out                   put the results into pretrain_bert.csv beside this script

Stories are generated and cut into pairs by several processes first (`--workers`), and kept in `--scratch`. Then the
runs of `RUNS` are done, `--jobs` at a time, each a process of its own:

    choice                     three learning rates at a quarter of the steps, seed 9; the best is used by all others
    bert                       15 % of the tokens chosen, 80/10/10, and next sentences; seeds 0, 1, 2
    bert, always [MASK]        every chosen token is hidden, none replaced or kept
    bert, no pairs             without the task of next sentences
    bert, all chosen           every token is chosen and hidden
    bert, nothing hidden       tokens are chosen and stay as they are
    gpt                        a GPT of the same width, depth and vocabulary that reads the same stories

All are judged on the same pairs (seed `TEST_SEED`), 15 % of whose tokens are hidden by [MASK]. At last `bert` and `gpt`
of seed 0, and the same networks with random weights, are tuned on the bundled messages, with the folds of
`ch06_classification/spam_runs.py`. Rates and poolings are chosen on folds of seed 9.

Left in `--output`: `results.json`, one list of rows for all runs, and the folder `tales-bert` with the weights of
`bert`, seed 0, in bfloat16.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.data.corpus import load_sms
from shared.finetuning.classification import encode_texts
from shared.finetuning.encoders import BERTClassifier
from shared.finetuning.tuning import GPTClassifier, fine_tune, label_logits
from shared.model.bert import BERTConfig, BERTForPreTraining, BERTModel
from shared.model.gpt import GPTConfig, GPTModel
from shared.pretraining.processes import cpu_name
from shared.tales.blanks import BlankFiller
from shared.tales.generator import TaleGenerator
from shared.tales.scoring import split_sentences
from shared.text.wordpiece import WordPieceTokenizer
from shared.training.batches import IGNORE
from shared.training.loop import train
from shared.training.losses import choose_device, next_token_loss
from shared.training.masking import (
    Masking,
    mask_tokens,
    pretraining_loss,
    pretraining_targets,
    sentence_pair,
)
from shared.training.optimizers import build_optimizers
from shared.training.schedules import build_schedule
from shared.weights.bert import OWN_CONFIG, load_bert, save_bert
from shared.weights.pretrained import load_pretrained, load_tokenizer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "pretrain_bert.csv"
COLUMNS = ["run", "role", "seed", "step", "measure", "value", "n", "right", "seconds", "hardware", "torch"]
KEY = ("run", "role", "seed", "step", "measure")

NAME, VOCAB_SIZE, CONTEXT_LENGTH = "tales-bert", 2816, 232


def _shape(emb_dim: int, n_heads: int, n_layers: int, **more: object) -> BERTConfig:
    """A BERT for tales."""
    return BERTConfig(
        VOCAB_SIZE, CONTEXT_LENGTH, emb_dim=emb_dim, n_heads=n_heads, n_layers=n_layers, dropout=0.0, **more
    )


CONFIG = _shape(160, 5, 5, feed_forward_dim=512)  # of the comparisons on a GPU
VOCABULARY_SEED, TRAINING_SEED, TEST_SEED, MASK_SEED = 2048, 30_000, 7003, 15
ALPHABET = "".join(map(chr, range(33, 127)))
LONGEST_HEAD = 7  # sentences of the first segment: every tale has at least 8
SEEDS, CHOICE_SEED = (0, 1, 2), 9
RATES = (5e-4, 1e-3, 2e-3)
N_STEPS, BATCH_SIZE, N_TEST, N_VALIDATION = 8000, 128, 2000, 500
N_FOLDS = 5
MESSAGE_RATE = 1e-3  # of the shipped model and the GPTs beside it; not chosen by any run

# Name -> how tokens are hidden, whether pairs are judged, share of the steps.
RUNS: dict[str, tuple[Masking, bool, float]] = {
    "bert": (Masking(), True, 1.0),
    "bert, always [MASK]": (Masking(0.15, 1.0, 0.0), True, 1.0),
    "bert, no pairs": (Masking(), False, 1.0),
    "bert, all chosen": (Masking(1.0, 1.0, 0.0), True, 0.25),
    "bert, nothing hidden": (Masking(0.15, 0.0, 0.0), True, 0.25),
}
HIDDEN = Masking(0.15, 1.0, 0.0)  # how all are judged

# Recipes of the shipped model, for one thread: short excerpts first, then whole stories (Devlin et al., 2019, A.2).
# Name -> shape, steps on excerpts, steps on stories, pairs of a batch, learning rate, type of the matrix products.
SIZES: dict[str, tuple[BERTConfig, int, int, int, float, torch.dtype | None]] = {
    "quick": (_shape(64, 4, 1, init_std=0.05), 2200, 250, 16, 6e-3, None),
    "full": (_shape(128, 4, 3), 2400, 1200, 64, 2e-3, torch.bfloat16),
}
EXCERPT = 4  # sentences
SHORT_SEED, LONG_SEED = 41_000, 42_000


# --- stories


def train_vocabulary() -> WordPieceTokenizer:
    """Return the vocabulary of the shipped model."""
    texts = [story.text for story in TaleGenerator(VOCABULARY_SEED).stories(5000)]
    return WordPieceTokenizer.train(texts, VOCAB_SIZE, alphabet=ALPHABET)


def story_sentences(tokenizer: WordPieceTokenizer, seed: int, n: int) -> list[list[list[int]]]:
    """The stories of a seed as lists of sentences, those as lists of ids."""
    return [
        [tokenizer.encode_ordinary(sentence) for sentence in split_sentences(story.text)]
        for story in TaleGenerator(seed).stories(n)
    ]


def make_pairs(tokenizer: WordPieceTokenizer, seed: int, n: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return pairs as inputs, int16 (n, context_length), their first segments' lengths, and how many had to be cut.

    The lengths are those of [CLS] first [SEP], negative where the label is 1.
    """
    length = CONTEXT_LENGTH
    documents, rng = story_sentences(tokenizer, seed, n), np.random.default_rng(seed)
    rows, heads, n_cut = np.zeros((n, length), dtype=np.int16), np.zeros(n, dtype=np.int16), 0
    for i in range(n):
        pair = sentence_pair(documents, rng, place=i, longest_head=LONGEST_HEAD)
        ids, segments = tokenizer.build_input(pair.first, pair.second, length)
        n_cut += len(pair.first) + len(pair.second) + 3 > length
        rows[i, : len(ids)] = ids
        heads[i] = segments.index(1) * (-1 if pair.label else 1)
    return rows, heads, n_cut


def make_stories(tokenizer: WordPieceTokenizer, seed: int, n: int) -> np.ndarray:
    """Return whole stories between [CLS] and [SEP], int16 (n, context_length): what the GPT reads."""
    length = CONTEXT_LENGTH
    rows = np.zeros((n, length), dtype=np.int16)
    for i, story in enumerate(TaleGenerator(seed).stories(n)):
        ids = tokenizer.build_input(tokenizer.encode_ordinary(story.text), max_length=length)[0]
        rows[i, : len(ids)] = ids
    return rows


def _part(arguments: tuple[str, str, int, int]) -> tuple[np.ndarray, np.ndarray | None, int]:
    """One process's share of the pairs or stories."""
    kind, vocabulary, seed, n = arguments
    tokenizer = WordPieceTokenizer.load(vocabulary)
    if kind == "stories":
        return make_stories(tokenizer, seed, n), None, 0
    return make_pairs(tokenizer, seed, n)


def prepare(scratch: Path, n_pairs: int, n_stories: int, workers: int) -> None:
    """Write the vocabulary and all pairs and stories to files, unless they are there."""
    wanted = {"pairs": n_pairs, "stories": n_stories}
    about = scratch / "about.json"
    if about.is_file() and json.loads(about.read_text()) == wanted:
        return
    scratch.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    train_vocabulary().save(scratch / "vocab.txt")
    print(f"vocabulary: {time.perf_counter() - started:.0f} s", flush=True)
    # Parts of at most 10,000, each with a seed of its own.
    parts = []
    for kind, total in wanted.items():
        for number, start in enumerate(range(0, total, 10_000)):
            seed = TRAINING_SEED + number
            parts.append((kind, str(scratch / "vocab.txt"), seed, min(10_000, total - start)))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        done = pool.map(_part, parts, chunksize=1)
    pairs = [part for part, (kind, *_) in zip(done, parts, strict=True) if kind == "pairs"]
    stories = [part for part, (kind, *_) in zip(done, parts, strict=True) if kind == "stories"]
    np.save(scratch / "pairs.npy", np.concatenate([rows for rows, _, _ in pairs]))
    np.save(scratch / "heads.npy", np.concatenate([heads for _, heads, _ in pairs]))
    np.save(scratch / "stories.npy", np.concatenate([rows for rows, _, _ in stories]))
    about.write_text(json.dumps(wanted))
    n_cut = sum(n for _, _, n in pairs)
    print(
        f"{n_pairs:,} pairs ({n_cut} cut), {n_stories:,} stories: {time.perf_counter() - started:.0f} s",
        flush=True,
    )


class Pairs:
    """Pairs on a device: rows of ids, length of the first segment, label.

    Args:
        rows, heads: As `make_pairs` returns them.
        device: Where they are kept.
    """

    def __init__(self, rows: np.ndarray, heads: np.ndarray, device: torch.device) -> None:
        self.rows = torch.from_numpy(np.ascontiguousarray(rows)).to(device)
        self.heads = torch.from_numpy(np.abs(heads).astype(np.int64)).to(device)
        self.labels = torch.from_numpy((heads < 0).astype(np.int64)).to(device)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, chosen: Tensor | slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return tokens, segments, mask and labels of some pairs, with little padding."""
        tokens = self.rows[chosen].long()
        mask = tokens != 0
        # A multiple of 16: a CPU keeps a plan for each shape that it has met.
        longest = min(-(-int(mask.sum(1).max()) // 16) * 16, tokens.shape[1])
        tokens, mask = tokens[:, :longest], mask[:, :longest]
        places = torch.arange(longest, device=tokens.device)
        segments = ((places >= self.heads[chosen][:, None]) & mask).long()
        return tokens, segments, mask, self.labels[chosen]


def training_batches(
    pairs: Pairs,
    masking: Masking,
    with_pairs: bool,
    tokenizer: WordPieceTokenizer,
    batch_size: int,
    seed: int,
    start: int,
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Yield batches without end, from batch `start` on: the same for the same seed, wherever a run was stopped."""
    device = pairs.rows.device
    n = len(pairs) // batch_size
    step = start
    while True:
        order = torch.from_numpy(np.random.default_rng([seed, step // n]).permutation(len(pairs))).to(device)
        while True:
            place = step % n * batch_size
            tokens, segments, mask, labels = pairs.batch(order[place : place + batch_size])
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
            hidden, targets = mask_tokens(
                tokens, tokenizer.special_ids, tokenizer.mask_id, tokenizer.vocab_size, masking, generator
            )
            if not with_pairs:
                labels = torch.full_like(labels, IGNORE)
            yield (hidden, segments, mask), pretraining_targets(targets, labels)
            step += 1
            if step % n == 0:
                break


def test_set(tokenizer: WordPieceTokenizer, n: int) -> tuple[Pairs, Tensor, Tensor]:
    """Return the pairs of the test, their tokens with 15 % hidden, and the targets; the same on every device."""
    rows, heads, _ = make_pairs(tokenizer, TEST_SEED, n)
    pairs = Pairs(rows, heads, torch.device("cpu"))
    generator = torch.Generator().manual_seed(MASK_SEED)
    hidden, targets = mask_tokens(
        pairs.rows.long(), tokenizer.special_ids, tokenizer.mask_id, tokenizer.vocab_size, HIDDEN, generator
    )
    return pairs, hidden, targets


@torch.no_grad()
def judge(
    model: BERTForPreTraining, test: tuple[Pairs, Tensor, Tensor], first: int, last: int
) -> dict[str, float]:
    """Return accuracies and losses on the test's pairs from `first` to `last`."""
    device = next(model.parameters()).device
    pairs, hidden, targets = test
    totals: dict[str, float] = defaultdict(float)
    for start in range(first, last, 250):
        chosen = slice(start, min(start + 250, last))
        tokens, segments, mask, labels = (part.to(device) for part in pairs.batch(chosen))
        asked = targets[chosen][:, : tokens.shape[1]].to(device)
        places = (asked.flatten() != IGNORE).nonzero().squeeze(1)
        logits, next_logits = model(hidden[chosen][:, : tokens.shape[1]].to(device), segments, mask, places)
        wanted = asked.flatten()[places]
        totals["masked accuracy"] += (logits.argmax(1) == wanted).sum().item()
        totals["masked loss"] += nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        totals["next accuracy"] += (next_logits.argmax(1) == labels).sum().item()
        totals["next loss"] += nn.functional.cross_entropy(next_logits, labels, reduction="sum").item()
        totals["n masked"] += len(places)
        totals["n next"] += len(labels)
    return {
        f"{task} {measure}": totals[f"{task} {measure}"] / totals[f"n {task}"]
        for task in ("masked", "next")
        for measure in ("accuracy", "loss")
    } | {"n masked": totals["n masked"], "n next": totals["n next"]}


def rows_of(
    run: str, role: str, seed: int, step: int, scores: dict[str, float], **more: object
) -> list[dict[str, object]]:
    """One row of the record for each score."""
    return [
        {"run": run, "role": role, "seed": seed, "step": step, "measure": name, "value": value}
        | {"n": int(scores.get(f"n {name.split()[0]}", 0))}
        | more
        for name, value in scores.items()
        if not name.startswith("n ")
    ]


# --- the runs


def pretrain(
    options: argparse.Namespace, run: str, role: str, seed: int, rate: float, n_steps: int
) -> list[dict]:
    """Pretrain one BERT; return its rows. Every 1,000 steps a state is kept from which it goes on."""
    masking, with_pairs, _ = RUNS[run]
    device, tokenizer = choose_device(options.device), WordPieceTokenizer.load(options.scratch / "vocab.txt")
    torch.manual_seed(seed)
    model = BERTForPreTraining(CONFIG).to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    test = test_set(tokenizer, options.n_test)
    rows, start, started = [], 0, time.perf_counter()
    # A run that was stopped goes on.
    file_name = _file_name(run, role, seed, *([rate] if role == "choice" else []))
    state_file = options.scratch / f"{file_name}-state.pt"
    if state_file.is_file():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rows, start = state["rows"], state["step"]
    pairs = Pairs(np.load(options.scratch / "pairs.npy"), np.load(options.scratch / "heads.npy"), device)

    def evaluate(step: int) -> float:
        n = min(N_VALIDATION, options.n_test)
        scores = judge(model, test, 0, n)
        rows.extend(rows_of(run, f"{role} curve", seed, step, scores))
        if step % 1000 == 0 and start < step < n_steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rows": rows,
                "step": step,
            }
            torch.save(state, state_file.with_suffix(".part"))
            os.replace(state_file.with_suffix(".part"), state_file)
        return scores["masked loss"]

    if start < n_steps:
        train(
            model,
            training_batches(pairs, masking, with_pairs, tokenizer, options.batch_size, seed, start),
            optimizer,
            n_steps=n_steps,
            start_step=start,
            loss=pretraining_loss,
            schedule=build_schedule("linear", n_steps, max(1, min(500, n_steps // 10))),
            autocast=torch.bfloat16 if device.type == "cuda" else None,
            evaluate_every=max(1, min(250, n_steps // 8)),
            on_evaluate=evaluate,
        )
    model.eval()
    more = {
        "seconds": round(time.perf_counter() - started),
        "hardware": hardware(device),
        "torch": torch.__version__,
    }
    rows += rows_of(run, role, seed, n_steps, judge(model, test, 0, options.n_test) | {"rate": rate}, **more)
    torch.save(model.state_dict(), options.scratch / f"{file_name}.pt")
    # What ships: 16 bits, judged as they are.
    if (run, role, seed) == ("bert", "run", SEEDS[0]):
        about = {
            "recipe": "appendix_vit_bert/pretrain_bert.py",
            "seed": seed,
            "steps": n_steps,
            "batch_size": options.batch_size,
            "learning_rate": rate,
            "data": f"tales of seeds {TRAINING_SEED} and after, {len(pairs):,} pairs",
        }
        save_bert(
            model,
            tokenizer,
            options.output / NAME,
            dtype=torch.bfloat16,
            config_name=OWN_CONFIG,
            replace=True,
            **about,
        )
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        rows += rows_of("bert, shipped", role, seed, n_steps, judge(model, test, 0, options.n_test), **more)
    state_file.unlink(missing_ok=True)
    return rows


def excerpt_pairs(tokenizer: WordPieceTokenizer, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs as `make_pairs` does, of a few sentences from anywhere in a story."""
    rng, length = np.random.default_rng(seed), CONTEXT_LENGTH
    documents = []
    for sentences in story_sentences(tokenizer, seed, n):
        start = int(rng.integers(len(sentences) - EXCERPT + 1))
        documents.append(sentences[start : start + EXCERPT])
    rows, heads = np.zeros((n, length), dtype=np.int16), np.zeros(n, dtype=np.int16)
    for i in range(n):
        pair = sentence_pair(documents, rng, place=i)
        ids, segments = tokenizer.build_input(pair.first, pair.second, length)
        rows[i, : len(ids)] = ids
        heads[i] = segments.index(1) * (-1 if pair.label else 1)
    return rows, heads


def sorted_batches(pairs: Pairs, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Yield the places of batches from number `start` on; rows of similar length together, each once an epoch."""
    n = len(pairs) // batch_size
    lengths = (pairs.rows != 0).sum(1)
    for epoch in range(start // n, 10**9):
        rng = np.random.default_rng([seed, epoch])
        order = torch.from_numpy(rng.permutation(len(pairs)))
        batches = []
        for pool in order.split(8 * batch_size):
            batches += [
                part for part in pool[lengths[pool].argsort()].split(batch_size) if len(part) == batch_size
            ]
        chosen = rng.permutation(len(batches))
        for i in chosen[start % n if epoch == start // n else 0 :]:
            yield batches[i]


def ship(options: argparse.Namespace) -> None:
    """Make the shipped model by a recipe of `SIZES`, on one thread.

    A state is kept every 100 steps, from which a stopped run goes on.
    """
    scratch = options.scratch
    config, n_short, n_long, batch_size, rate, autocast = SIZES[options.ship]
    steps = n_short + n_long
    scratch.mkdir(parents=True, exist_ok=True)
    if not (scratch / "vocab.txt").is_file():
        train_vocabulary().save(scratch / "vocab.txt")
    tokenizer = WordPieceTokenizer.load(scratch / "vocab.txt")
    device = choose_device(options.device)
    torch.manual_seed(options.seed)
    model = BERTForPreTraining(config).to(device)
    optimizer = build_optimizers(model, "adamw", rate, betas=(0.9, 0.98))[0]
    test, state_file = (
        test_set(tokenizer, options.n_test),
        scratch / f"ship-{options.ship}-{options.seed}-state.pt",
    )
    rows, step, seconds, losses = [], 0, 0.0, []
    if state_file.is_file():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rows, step, seconds = state["rows"], state["step"], state["seconds"]
    started = time.process_time() - seconds

    def evaluate(now: int) -> float:
        scores = judge(model, test, 0, 100)
        spent = round(time.process_time() - started)
        recent = sum(losses[-50:]) / max(1, len(losses[-50:]))
        shown = {name: round(value, 3) for name, value in scores.items()}
        print(f"{now}: {spent} s, loss {recent:.2f},", shown, flush=True)
        if now != step:
            rows.extend(rows_of("bert, shipped", "curve", options.seed, now, scores, seconds=spent))
            # A rate that a schedule has scaled is not the peak.
            kept = optimizer.state_dict()
            for group in kept["param_groups"]:
                group["lr"] = group.pop("initial_lr", group["lr"])
            state = {"model": model.state_dict(), "optimizer": kept, "rows": rows, "step": now}
            torch.save(state | {"seconds": time.process_time() - started}, state_file.with_suffix(".part"))
            os.replace(state_file.with_suffix(".part"), state_file)
        return scores["masked loss"]

    for first, last in ((0, n_short), (n_short, steps)):
        if step >= last:
            continue
        make = excerpt_pairs if first == 0 else make_pairs
        seed = (SHORT_SEED if first == 0 else LONG_SEED) + options.seed
        pairs = Pairs(*make(tokenizer, seed, (last - first) * batch_size + 8 * batch_size)[:2], device)

        def batches(start: int, pairs: Pairs = pairs) -> Iterator[tuple]:
            for number, places in enumerate(sorted_batches(pairs, batch_size, options.seed, start), start):
                tokens, segments, mask, labels = pairs.batch(places)
                generator = torch.Generator(device).manual_seed(options.seed * 1_000_003 + number)
                hidden, targets = mask_tokens(
                    tokens,
                    tokenizer.special_ids,
                    tokenizer.mask_id,
                    tokenizer.vocab_size,
                    Masking(),
                    generator,
                )
                yield (hidden, segments, mask), pretraining_targets(targets, labels)

        # On a CPU the fused attention is slow backwards.
        fast = (
            [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        )
        with sdpa_kernel(fast):
            train(
                model,
                batches(step - first),
                optimizer,
                n_steps=last,
                start_step=step,
                loss=pretraining_loss,
                max_grad_norm=1.0,
                schedule=build_schedule("linear", steps, min(125, steps // 20)),
                autocast=autocast,
                evaluate_every=100,
                on_evaluate=evaluate,
                on_step=lambda entry: losses.append(entry.loss),
            )
        step = last
    # In 16 bits, judged as they are.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    more = {
        "seconds": round(time.process_time() - started),
        "hardware": cpu_name() if device.type == "cpu" else hardware(device),
        "torch": torch.__version__,
    }
    rows += rows_of(
        "bert, shipped", "run", options.seed, steps, judge(model.eval(), test, 0, options.n_test), **more
    )
    about = {
        "recipe": f"python pretrain_bert.py --ship {options.ship}",
        "seed": options.seed,
        "steps": {"excerpts": n_short, "stories": n_long},
        "batch_size": batch_size,
        "learning_rate": rate,
        **more,
    }
    save_bert(
        model,
        tokenizer,
        options.output / NAME,
        dtype=torch.bfloat16,
        config_name=OWN_CONFIG,
        replace=True,
        **about,
    )
    (options.output / "ship.json").write_text(json.dumps(rows))


def gpt_config() -> GPTConfig:
    """A GPT of the width, depth and vocabulary of our BERT."""
    c = CONFIG
    same = {
        "emb_dim": c.emb_dim,
        "n_heads": c.n_heads,
        "n_layers": c.n_layers,
        "feed_forward_dim": c.feed_forward_dim,
    }
    return GPTConfig(
        vocab_size=c.vocab_size, context_length=c.context_length, dropout=0.0, activation="gelu", **same
    )


def pretrain_gpt(options: argparse.Namespace, seed: int, rate: float, n_steps: int) -> list[dict]:
    """Pretrain the GPT of the same size on whole stories; return its rows."""
    device = choose_device(options.device)
    torch.manual_seed(seed)
    model = GPTModel(gpt_config()).to(device)
    stories = torch.from_numpy(np.load(options.scratch / "stories.npy")).to(device)
    tokenizer = WordPieceTokenizer.load(options.scratch / "vocab.txt")
    started = time.perf_counter()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng(seed)
        while True:
            order = torch.from_numpy(rng.permutation(len(stories))).to(device)
            for part in order.split(options.batch_size):
                tokens = stories[part].long()
                tokens = tokens[:, : int((tokens != 0).sum(1).max())]
                yield tokens[:, :-1], torch.where(tokens[:, 1:] == 0, IGNORE, tokens[:, 1:])

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    train(
        model,
        batches(),
        optimizer,
        n_steps=n_steps,
        schedule=build_schedule("linear", n_steps, max(1, min(500, n_steps // 10))),
        autocast=torch.bfloat16 if device.type == "cuda" else None,
    )
    # On the stories of the test's true pairs: the loss, and the hidden places read from the left alone, nothing hidden.
    model.eval()
    pairs, _, targets = test_set(tokenizer, options.n_test)
    right = asked = nats = n_stories = 0.0
    with torch.no_grad():
        for i in (pairs.labels == 0).nonzero().squeeze(1).tolist():
            row = pairs.rows[i].long()
            length, cut = int((row != 0).sum()), int(pairs.heads[i]) - 1  # the [SEP] in the middle goes
            keep = torch.tensor([j for j in range(length) if j != cut])
            story, wanted = row[keep], targets[i][keep]
            logits = model(story[None, :-1].to(device)).cpu()
            nats += next_token_loss(logits, story[None, 1:], reduction="sum").item()
            places = wanted[1:] != IGNORE
            right += (logits[0].argmax(1)[places] == story[1:][places]).sum().item()
            asked += int(places.sum())
            n_stories += 1
    torch.save(model.state_dict(), options.scratch / f"{_file_name('gpt', 'run', seed)}.pt")
    scores = {"masked accuracy": right / asked, "story loss": nats / n_stories, "rate": rate}
    scores |= {"n masked": asked, "n story": n_stories}
    more = {
        "seconds": round(time.perf_counter() - started),
        "hardware": hardware(device),
        "torch": torch.__version__,
    }
    return rows_of("gpt", "run", seed, n_steps, scores, **more)


# --- the messages


def message_folds(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Five times the places of training and of judged messages: the folds of ch06_classification/spam_runs.py."""
    from sklearn.model_selection import StratifiedGroupKFold

    messages = load_sms()
    splits = np.array([row.split for row in messages])
    labels = np.array([int(row.label == "spam") for row in messages])
    places = np.flatnonzero(splits != "test")
    groups = np.unique(np.array([row.text for row in messages])[places].astype(str), return_inverse=True)[1]
    cutter = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=seed)
    return [(places[train], places[judged]) for train, judged in cutter.split(places, labels[places], groups)]


def tune_messages(
    options: argparse.Namespace, run: str, role: str, seed: int, rate: float, pooling: str
) -> list[dict]:
    """Tune one network on the messages, fold by fold, and on the test split; return its rows."""
    from sklearn.model_selection import train_test_split

    device, tokenizer = choose_device(options.device), WordPieceTokenizer.load(options.scratch / "vocab.txt")
    messages = load_sms()
    splits = np.array([row.split for row in messages])
    labels = np.array([int(row.label == "spam") for row in messages])
    length = CONTEXT_LENGTH
    if run.startswith("tales"):
        ids = encode_texts(load_tokenizer(run), [row.text for row in messages], 256)[0]
    else:
        ids = [
            tokenizer.build_input(tokenizer.encode_ordinary(row.text), max_length=length)[0]
            for row in messages
        ]
    started, rows = time.perf_counter(), []
    kinds = ["folds"] if role == "choice" or options.quick else ["folds", "test"]
    for kind in kinds:
        if kind == "folds":
            parts = message_folds(seed)[: 1 if options.quick else N_FOLDS]
        else:
            parts = [(np.flatnonzero(splits != "test"), np.flatnonzero(splits == "test"))]
        right = {}
        for known, judged in parts:
            # A fold takes a tenth of its training messages to stop by; the test split has a validation split.
            if kind == "test":
                learned, watched = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "validation")
            else:
                learned, watched = train_test_split(
                    known, test_size=0.1, random_state=seed, stratify=labels[known]
                )
            torch.manual_seed(seed)
            classifier = new_classifier(options, run, pooling).to(device)
            body = [p for name, p in classifier.named_parameters() if not name.startswith("head")]
            groups = [
                {"params": body, "lr": rate},
                {"params": list(classifier.head.parameters()), "lr": 1e-2},
            ]
            fine_tune(
                classifier,
                [ids[i] for i in learned],
                labels[learned],
                ([ids[i] for i in watched], labels[watched]),
                torch.optim.AdamW(groups, weight_decay=0.05),
                n_epochs=1 if options.quick else 6,
                seed=seed,
            )
            found = label_logits(classifier, [ids[i] for i in judged]).argmax(1).numpy()
            right |= dict(zip(judged.tolist(), (found == labels[judged]).astype(int).tolist(), strict=True))
        measure = f"messages {kind}"
        score = {"messages accuracy": sum(right.values()) / len(right), "n messages": len(right)}
        more = {
            "seconds": round(time.perf_counter() - started),
            "hardware": hardware(device),
            "torch": torch.__version__,
        }
        row = rows_of(run, role, seed, 0, score, **more)[0] | {"measure": measure}
        rows.append(row | {"right": "".join(str(right[i]) for i in sorted(right))})
    return rows


def new_classifier(options: argparse.Namespace, run: str, pooling: str) -> nn.Module:
    """The network that a run of the messages begins with."""
    if run.startswith("tales"):
        return GPTClassifier(load_pretrained(run), 2, pooling)
    if run.startswith("shipped"):
        body = load_bert(options.output / NAME if (options.output / NAME).is_dir() else NAME)
        if "random" in run:
            body = BERTModel(body.config)
        return BERTClassifier(body, 2, pooling)
    weights = None
    if "random" not in run:
        name = _file_name("gpt" if run.startswith("gpt") else "bert", "run", SEEDS[0])
        weights = torch.load(options.scratch / f"{name}.pt", map_location="cpu", weights_only=True)
    if run.startswith("gpt"):
        body = GPTModel(gpt_config())
        if weights:
            body.load_state_dict(weights)
        return GPTClassifier(body, 2, pooling)
    model = BERTForPreTraining(CONFIG)
    if weights:
        model.load_state_dict(weights)
    return BERTClassifier(model.bert, 2, pooling)


# --- what needs no training


def baselines(options: argparse.Namespace) -> list[dict]:
    """Rules that learn by counting: the most frequent token, the neighbours, words that two segments share."""
    tokenizer = WordPieceTokenizer.load(options.scratch / "vocab.txt")
    pairs, hidden, targets = test_set(tokenizer, options.n_test)
    rows = np.load(options.scratch / "pairs.npy", mmap_mode="r")[:20_000].astype(np.int64)
    heads = np.load(options.scratch / "heads.npy")[:20_000]
    # What stands between two neighbours, or after one, or anywhere.
    anywhere = Counter(rows[rows > 4].tolist())
    left: dict[int, Counter] = defaultdict(Counter)
    both: dict[tuple[int, int], Counter] = defaultdict(Counter)
    for row in rows.tolist():
        for a, b, c in zip(row, row[1:], row[2:], strict=False):
            if b > 4:
                left[a][b] += 1
                both[a, c][b] += 1
    most = anywhere.most_common(1)[0][0]
    best_left = {a: counts.most_common(1)[0][0] for a, counts in left.items()}
    best_both = {a: counts.most_common(1)[0][0] for a, counts in both.items()}
    scores: Counter[str] = Counter()
    for row, asked in zip(hidden.tolist(), targets.tolist(), strict=True):
        for place, wanted in enumerate(asked):
            if wanted != IGNORE:
                scores["n"] += 1
                scores["most frequent token"] += wanted == most
                by_left = best_left.get(row[place - 1], most)
                after = row[place + 1] if place + 1 < len(row) else 0
                scores["neighbours"] += wanted == best_both.get((row[place - 1], after), by_left)
    result = []
    for name in ("most frequent token", "neighbours"):
        result += rows_of(
            name, "baseline", 0, 0, {"masked accuracy": scores[name] / scores["n"], "n masked": scores["n"]}
        )
    # Rare words that both segments have, each weighted by how rare it is; the threshold from training pairs.
    frequency = Counter(i for row in rows for i in set(row.tolist()))
    weight = {i: math.log(len(rows) / n) for i, n in frequency.items()}

    def overlap(row: Iterable[int], head: int) -> float:
        row = list(row)
        shared = {i for i in row[:head] if i > 4} & {i for i in row[head:] if i > 4}
        return sum(weight.get(i, 0.0) for i in shared)

    known = np.array(
        [overlap(row, abs(int(head))) for row, head in zip(rows[:4000].tolist(), heads[:4000], strict=True)]
    )
    follows = heads[:4000] > 0
    order = np.argsort(known)
    # With the threshold behind place k, the first k are called others.
    correct = np.concatenate([[0], np.cumsum(~follows[order])]) + np.concatenate(
        [np.cumsum(follows[order][::-1])[::-1], [0]]
    )
    k = int(correct.argmax())
    threshold = known[order][min(k, len(order) - 1)]
    test = np.array(
        [overlap(row, int(head)) for row, head in zip(hidden.tolist(), pairs.heads.tolist(), strict=True)]
    )
    accuracy = float(((test >= threshold) == (pairs.labels.numpy() == 0)).mean())
    result += rows_of("shared rare words", "baseline", 0, 0, {"next accuracy": accuracy, "n next": len(test)})
    checksum = int((hidden * torch.arange(hidden.numel()).view_as(hidden) % 1_000_003).sum())
    result += rows_of("test set", "baseline", 0, 0, {"checksum": checksum, "n checksum": len(hidden)})
    share = float((pairs.labels == 0).float().mean())
    return result + rows_of(
        "always the same", "baseline", 0, 0, {"next accuracy": max(share, 1 - share), "n next": len(test)}
    )


def ceiling(options: argparse.Namespace) -> list[dict]:
    """What the grammar allows on the test's pairs: the exact chance of each answer, given all that is seen."""
    tokenizer = WordPieceTokenizer.load(options.scratch / "vocab.txt")
    pairs, hidden, targets = test_set(tokenizer, options.n_test)
    filler, scores = BlankFiller(tokenizer, most_sentences=LONGEST_HEAD), defaultdict(float)
    for row, asked, head, label in zip(
        hidden.tolist(), targets.tolist(), pairs.heads.tolist(), pairs.labels.tolist(), strict=True
    ):
        seen = [None if token == tokenizer.mask_id else token for token in row]
        found = filler.fill_pair(seen[1 : head - 1], seen[head : row.index(tokenizer.sep_id, head)])
        wanted = [token for token in asked if token != IGNORE]
        scores["n masked"] += len(wanted)
        scores["masked accuracy"] += sum(found.best)
        scores["masked loss"] -= sum(
            math.log(place[token]) for place, token in zip(found.places, wanted, strict=True)
        )
        scores["n next"] += 1
        scores["next accuracy"] += max(found.follows, 1 - found.follows)
        scores["next loss"] -= math.log(1 - found.follows if label else found.follows)
    means = {
        name: value / scores[f"n {name.split()[0]}"] for name, value in scores.items() if name[:2] != "n "
    }
    return rows_of("ceiling", "ceiling", 0, 0, means | {n: scores[n] for n in ("n masked", "n next")})


def hardware(device: torch.device) -> str:
    """The name of what computed."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"


# --- which jobs there are, and in which order


def _file_name(*parts: object) -> str:
    """Parts of a name as a file name."""
    return re.sub(r"[^\w.]+", "-", "-".join(map(str, parts))).strip("-")


def _results(options: argparse.Namespace) -> list[dict]:
    """All rows of the jobs that are done."""
    return [
        row for path in sorted(options.scratch.glob("job-*.json")) for row in json.loads(path.read_text())
    ]


def best_rate(options: argparse.Namespace) -> float:
    """The learning rate of the choice with the lowest loss on masked tokens."""
    rates = options.rates
    found = [
        (row["value"], rates[int(row["run"].split()[-1])])
        for row in _results(options)
        if row["role"] == "choice" and row["measure"] == "masked loss"
    ]
    return min(found)[1]


def best_tuning(options: argparse.Namespace, run: str) -> tuple[float, str]:
    """Rate and pooling of the messages' choice with the most right answers."""
    found = [
        (row["value"], row["run"])
        for row in _results(options)
        if row["role"] == "choice" and row["run"].startswith(f"{run}; ")
    ]
    _, rate, pooling = max(found)[1].split("; ")
    return float(rate), pooling


def jobs(options: argparse.Namespace) -> list[list[str]]:
    """The names of all jobs, stage by stage; jobs of one stage can run side by side."""
    tuned = ("bert", "bert, random start", "gpt", "gpt, random start")
    choices = []
    for run in tuned:
        rates = (1e-3, 3e-3) if "random" in run else (1e-4, 3e-4, 1e-3)
        poolings = ("mean", "pooler") if run == "bert" else ("mean",)
        choices += [f"choose|{run}|{rate}|{pooling}" for rate in rates for pooling in poolings]
    if options.quick:
        choices = [c for c in choices if "|mean" in c and "|0.001" in c]
    seeds = SEEDS[:1] if options.quick else SEEDS
    main = [f"bert|bert|{seed}" for seed in seeds]
    return [
        ["baselines", "ceiling", *(f"rate|{i}" for i in range(len(options.rates)))],
        [*main, "gpt", *(f"bert|{run}|{SEEDS[0]}" for run in RUNS if run != "bert")],
        choices,
        [f"messages|{run}|{seed}" for run in tuned for seed in seeds],
    ]


def do_job(options: argparse.Namespace, name: str) -> list[dict]:
    """Do one job and return its rows."""
    kind, *rest = name.split("|")
    if kind == "baselines":
        return baselines(options)
    if kind == "ceiling":
        return ceiling(options)
    if kind == "rate":
        rate = options.rates[int(rest[0])]
        try:
            rows = pretrain(options, "bert", "choice", CHOICE_SEED, rate, max(2, options.steps // 4))
        except FloatingPointError:  # too high a rate is an answer too
            rows = rows_of("bert", "choice", CHOICE_SEED, 0, {"masked loss": 99.0, "rate": rate})
        return [row | {"run": f"bert, rate {rest[0]}"} for row in rows]
    if kind == "bert":
        run, seed = rest
        return pretrain(
            options, run, "run", int(seed), best_rate(options), max(2, int(options.steps * RUNS[run][2]))
        )
    if kind == "gpt":
        return pretrain_gpt(options, SEEDS[0], best_rate(options), options.steps)
    if kind == "choose":
        run, rate, pooling = rest
        rows = tune_messages(options, run, "choice", CHOICE_SEED, float(rate), pooling)
        return [row | {"run": f"{run}; {rate}; {pooling}"} for row in rows]
    run, seed = rest
    rate, pooling = best_tuning(options, run)
    return tune_messages(options, run, "run", int(seed), rate, pooling)


def run_all(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Do all jobs that are not done, several at a time, each in a process of its own."""
    for stage in jobs(options):
        waiting = [name for name in stage if not (options.scratch / f"job-{_file_name(name)}.json").is_file()]
        running: dict[str, tuple[subprocess.Popen, float]] = {}
        failed = []
        while waiting or running:
            while waiting and len(running) < options.jobs:
                name = waiting.pop(0)
                command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--job", name]
                running[name] = subprocess.Popen(command), time.perf_counter()
            for name, (process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    print(
                        f"{name}: code {process.returncode}, {time.perf_counter() - started:.0f} s",
                        flush=True,
                    )
                    failed += [name] if process.returncode else []
                    # What is there is written at once: the machine may be taken away.
                    (options.output / "results.json").write_text(json.dumps(_results(options)))
            time.sleep(0.1)
        if failed:
            raise SystemExit(f"these jobs failed: {', '.join(failed)}; start again to try them once more")


def collect(folder: Path) -> None:
    """Put the rows of a folder's results into the record beside this script."""
    from shared.notebook.records import replace_rows

    rows = []
    for path in sorted(folder.glob("*.json")):
        rows += json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        if isinstance(row["value"], float):
            row["value"] = f"{row['value']:.6g}"
    replace_rows(RESULTS, COLUMNS, rows, lambda row: tuple(str(row[name]) for name in KEY))
    print(f"{len(rows)} rows in {RESULTS}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options and do what they say."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--output", type=Path, default=Path("bert_results"), help="results and the checkpoint's folder"
    )
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir(), "tales-bert"), help="pairs, states"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=N_STEPS)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--pairs", type=int, default=0, help="how many there are; 0: as many as a run reads")
    parser.add_argument("--n-test", type=int, default=N_TEST)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that write stories")
    parser.add_argument("--quick", action="store_true", help="one seed, few pairs: only to see that it runs")
    parser.add_argument("--collect", type=Path, help="a folder whose results go into the record")
    parser.add_argument("--ship", choices=SIZES, help="make the shipped model, on one thread")
    parser.add_argument("--messages", help="tune on messages: shipped, shipped random, tales-tiny, tales-1m")
    parser.add_argument("--seed", type=int, default=0, help="of --ship")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.collect:
        collect(options.collect)
        return
    if options.steps < 8 or options.batch_size < 2 or options.jobs < 1:
        parser.error("steps must be at least 8, batch-size at least 2, jobs at least 1")
    options.rates = RATES[:1] if options.quick else RATES
    if options.quick:
        options.n_test = min(options.n_test, 100)
    # The GPU's order of sums may differ: repeated runs agree to some digits, not to the last.
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    if options.messages:
        rows = tune_messages(options, options.messages, "run", options.seed, MESSAGE_RATE, "mean")
        name = f"messages-{_file_name(options.messages, options.seed)}.json"
        (options.output / name).write_text(json.dumps(rows))
        return
    if options.ship:
        options.output.mkdir(parents=True, exist_ok=True)
        ship(options)
        return
    if options.job:
        rows = do_job(options, options.job)
        file = options.scratch / f"job-{_file_name(options.job)}.json"
        file.with_suffix(".part").write_text(json.dumps(rows))
        os.replace(file.with_suffix(".part"), file)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    n_pairs = options.pairs or options.steps * options.batch_size
    prepare(options.scratch, n_pairs, n_pairs // 2, options.workers)
    run_all(options, arguments)
    print(f"all is done: {options.output}")


if __name__ == "__main__":
    main()
