"""Let the language models of seven eras race over the same texts, and record what came of it.

    python race.py                     everything that the record lacks
    python race.py --runner gru gpt    only some runners
    python race.py --again             also what the record has already

On the tales every runner reads the same 3,000 stories once and is judged on 200 others; one seed is one set of stories
and one set of first weights. On the bundled English stories, which are only 85 KB, it reads bytes, some of them
several times. `race.csv` has a row for each run; `race_samples.csv` a text that each runner wrote. Learning rates are
chosen on another seed, on a third of the training, and stand in the record with the role "choice". A run replaces the
row of the same text, runner, role, seed and rate, so the script goes on where it was stopped. One thread is used.

In the role "long" a GRU and the longest counts read three times the tales, as many as a GPT by the recipe of `tales-1m`
read in the runs of four minutes that `ch05_pretraining/recipes/comparison.csv` records.
"""

import argparse
import gzip
import lzma
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor, nn

from shared.data.corpus import load_stories
from shared.data.models import has_model
from shared.model.gpt import GPTConfig, GPTModel
from shared.notebook.ngrams import NGramModel
from shared.notebook.records import read_rows, replace_row
from shared.notebook.runners import FeedForwardLM, RecurrentLM, RuleWriter, sample_ids
from shared.pretraining.processes import cpu_name
from shared.tales.encoding import VOCAB_SIZE, tale_encoding
from shared.tales.generator import TaleGenerator, lexicon, lexicons
from shared.training.batches import Batch, document_row, pad_rows, row_batches
from shared.training.loop import train
from shared.training.losses import next_token_loss
from shared.training.optimizers import build_optimizers
from shared.training.schedules import build_schedule
from shared.weights.pretrained import load_pretrained, load_tokenizer

HERE = Path(__file__).resolve().parent
RESULTS, SAMPLES = HERE / "race.csv", HERE / "race_samples.csv"
COLUMNS = [
    "text",
    "runner",
    "role",
    "seed",
    "learning_rate",
    "detail",
    "parameters",
    "tokens_read",
    "cpu_seconds",
    "bits_per_byte",
    "order",
    "neighbours",
    "memory",
    "hardware",
    "torch",
]
KEY = ("text", "runner", "role", "seed", "learning_rate")

SEEDS, CHOICE_SEED, TEST_SEED = (0, 1, 2), 9, 4343
N_TRAINING, N_TEST, N_PAIRS = 3000, 200, 100  # stories, stories, pairs of stories
N_LONG = 9064  # stories of the role "long"
BATCH = 4  # stories of an update
WINDOW = 128  # bytes of a row
BYTE_BATCH, BYTE_STEPS = 8, 400  # rows of an update, updates: five times the text
KINDS = ("order", "neighbours", "memory")
FAR = 80  # characters between a name and its mention before


@dataclass(frozen=True)
class Network:
    """A runner that learns by gradients: how it is built for tokens and for bytes, and rates to choose from by text."""

    for_tales: Callable[[], nn.Module]
    for_bytes: Callable[[], nn.Module]
    rates: dict[str, tuple[float, ...]]


def build_gpt(vocab_size: int, n_layers: int, emb_dim: int) -> GPTModel:
    """Return a GPT of the course, with normed queries and keys as in the sweeps of chapter 5."""
    shape = {"n_layers": n_layers, "emb_dim": emb_dim, "n_heads": emb_dim // 16}
    return GPTModel(GPTConfig.preset("tales-1m", vocab_size=vocab_size, qk_norm=True, **shape))


NETWORKS = {
    "feed-forward": Network(
        lambda: FeedForwardLM(VOCAB_SIZE, 6, 64, 256),
        lambda: FeedForwardLM(256, 10, 24, 256),
        {"tales": (0.006, 0.012, 0.024), "stories": (0.012, 0.024, 0.048)},
    ),
    "gru": Network(
        lambda: RecurrentLM(VOCAB_SIZE, 128, 256),
        lambda: RecurrentLM(256, 48, 192),
        {"tales": (0.006, 0.012, 0.024), "stories": (0.012, 0.024, 0.048)},
    ),
    "gpt": Network(
        lambda: build_gpt(VOCAB_SIZE, 4, 96),
        lambda: build_gpt(256, 3, 64),
        {"tales": (0.005, 0.01, 0.02), "stories": (0.01, 0.02, 0.04)},
    ),
}
# Of the GRU that reads N_LONG tales: at the rate of the race it went astray, to 0.77 bits per byte (in the record).
LONG_RATE = 0.006
# The order of the n-gram model; for Kneser-Ney the best one on stories that are neither learned nor judged.
COUNTS = {"unigram": 1, "bigram": 2, "kneser-ney": 8}
BYTE_COUNTS = {"unigram": 1, "bigram": 2, "kneser-ney": 6}
SHIPPED = {"tales-1m": 96_000, "tales-3m": 296_000}  # stories that they were trained on
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}
RUNNERS = ("rules", *COUNTS, *NETWORKS, *SHIPPED, *COMPRESSORS, "smollm2")


# The tales: stories, and pairs of stories that differ in one place


@cache
def training_texts(seed: int, n_stories: int = N_TRAINING) -> list[str]:
    """Return the stories that all runners of a seed read."""
    return [story.text for story in TaleGenerator(100 + seed).stories(n_stories)]


@cache
def test_stories(seed: int = TEST_SEED) -> list:
    """Return the stories on which runners are judged."""
    return list(TaleGenerator(seed).stories(N_TEST))


def floor_bits_per_byte(stories: Sequence) -> float:
    """Return the least bits per byte that any model can have on tales: what their own grammar needs."""
    nats = -sum(story.log_probability for story in stories)
    return nats / math.log(2) / sum(len(story.text.encode()) for story in stories)


@cache
def broken_pairs(kind: str, n: int = N_PAIRS, seed: int = 1) -> list[tuple[str, str]]:
    """Return pairs (story, the same story with one fault).

    Args:
        kind: "order": two neighbouring words changed places. "neighbours": a word is exchanged for one that was seen
            before the word on its right and after the word on its left, but never between the two. "memory": a person
            is mentioned by the name of somebody else, far from every earlier mention.
        n: Number of pairs, less those whose faulty story turns out to be the right one.
        seed: Of the places and words.

    Raises:
        KeyError: The kind is unknown.
    """
    spoil = {"order": _exchange_two, "neighbours": _replace_one, "memory": _rename}[kind]
    random, pairs = Random(seed), []
    for story in TaleGenerator(TEST_SEED + 1).stories(40 * n):
        wrong = spoil(story, random)
        if wrong is not None:
            pairs.append((story.text, wrong))
        if len(pairs) == n:  # a word may have been exchanged for itself, if the right triple was never seen
            return [(right, wrong) for right, wrong in pairs if right != wrong]
    raise ValueError(f"n must be at most {len(pairs)}, got {n}")


def _exchange_two(story, random: Random) -> str | None:
    words = story.text.split(" ")
    place = random.randrange(1, len(words) - 2)
    if words[place] == words[place + 1]:
        return None
    words[place : place + 2] = words[place + 1], words[place]
    return " ".join(words)


@cache
def _seen() -> tuple[dict[str, list[str]], set[tuple[str, str]], set[tuple[str, str, str]]]:
    """Return what stood after each word in the training stories of all seeds, and which pairs and triples occurred."""
    after: dict[str, Counter] = {}
    pairs, triples = set(), set()
    for seed in SEEDS:
        for text in training_texts(seed):
            words = text.split(" ")
            for pair in pairwise(words):
                after.setdefault(pair[0], Counter())[pair[1]] += 1
                pairs.add(pair)
            triples.update(zip(words, words[1:], words[2:], strict=False))
    return {word: sorted(counts) for word, counts in after.items()}, pairs, triples


@cache
def _filling() -> set[str]:
    """Return the words that the grammar draws by chance: for those another word may be just as right."""
    return {part for name in lexicons() for words in lexicon(name) for part in words.split()}


def _replace_one(story, random: Random) -> str | None:
    after, pairs, triples = _seen()
    words = story.text.split(" ")
    places = [
        i
        for i in range(1, len(words) - 1)
        if words[i].isalpha() and words[i].islower() and words[i] not in _filling()
    ]
    random.shuffle(places)
    for i in places:
        left, right = words[i - 1], words[i + 1]
        fitting = [
            word
            for word in after.get(left, ())
            if (word, right) in pairs
            and (left, word, right) not in triples
            and word.isalpha()
            and word.islower()
        ]
        if fitting:
            return " ".join([*words[:i], random.choice(fitting), *words[i + 1 :]])
    return None


def _rename(story, random: Random) -> str | None:
    name, text = story.facts["who"], story.text
    last = text.rfind(name)
    if text.rfind(name, 0, last) in (-1, *range(last - FAR, last)):
        return None
    others = [other for other in lexicon("girl" if name in lexicon("girl") else "boy") if other not in text]
    return text[:last] + random.choice(others) + text[last + len(name) :]


# A runner, once trained, is a function from texts to the bits that each costs

Bits = Callable[[Sequence[str]], list[float]]


def bits_of_counts(model: NGramModel) -> Bits:
    """Return the bits of tales under a counting model."""
    return lambda texts: [-model.log2_probabilities(tale_ids(text)).sum() for text in texts]


def tale_ids(text: str) -> list[int]:
    """Return the ids of a story, its end included."""
    return document_row(text, tale_encoding())[1:]


def bits_of_network(model: nn.Module) -> Bits:
    """Return the bits of tales under a network."""

    @torch.no_grad()
    def bits(texts: Sequence[str]) -> list[float]:
        rows = [document_row(text, tale_encoding()) for text in texts]
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), 32):
            places = order[start : start + 32]
            inputs, targets = pad_rows([rows[i] for i in places])
            nats = next_token_loss(model.eval()(inputs), targets, reduction="none").double().sum(1)
            for i, loss in zip(places, nats.tolist(), strict=True):
                found[i] = loss / math.log(2)
        return found

    return bits


def judge(bits: Bits, stories: Sequence) -> dict[str, float]:
    """Return what is recorded of a runner on the tales: bits per byte, and how many faults it noticed.

    A fault is noticed where the faulty story costs more bits; half is counted where both cost the same.
    """
    n_bytes = sum(len(story.text.encode()) for story in stories)
    found = {"bits_per_byte": round(float(sum(bits([story.text for story in stories]))) / n_bytes, 4)}
    for kind in KINDS:
        right, wrong = zip(*broken_pairs(kind), strict=True)
        differences = np.subtract(bits(wrong), bits(right))
        noticed = (differences > 1e-3).mean() + (np.abs(differences) <= 1e-3).mean() / 2
        found[kind] = round(float(noticed), 3)
    return found


# Training


def fit(model: nn.Module, batches: Iterable[Batch], rate: float, n_steps: int) -> int:
    """Train a network, with a tenth of warm-up and a fall over the last half; return the number of targets.

    A GPT is trained as in the sweeps of chapter 5: Muon with the rate for its matrices, AdamW with 0.006 for the rest.
    The other networks have no blocks; they get AdamW with the rate.
    """
    if isinstance(model, GPTModel):
        optimizers = build_optimizers(model, "muon", 6e-3, matrix_learning_rate=rate)
    else:
        optimizers = build_optimizers(model, "adamw", rate)
    schedule = build_schedule("wsd", n_steps, n_steps // 10, decay=0.5)
    log = train(
        model,
        batches,
        optimizers,
        n_steps=n_steps,
        schedule=lambda step: schedule(step + 1),
    )
    return log[-1].tokens


def tale_batches(seed: int, n_stories: int) -> Iterator[Batch]:
    """Yield the first training stories of a seed, each once."""
    rows = [document_row(text, tale_encoding()) for text in training_texts(seed, n_stories)]
    return row_batches(rows, BATCH, seed=seed)


@cache
def story_bytes(split: str) -> list[bytes]:
    """Return the English stories of a split as bytes, each with its title."""
    return [f"{story.title}\n\n{story.text}".encode() for story in load_stories(split)]


def byte_batches(seed: int) -> Iterator[Batch]:
    """Yield windows from anywhere in the training stories, without end."""
    data = torch.frombuffer(bytearray(b"\n\n\n\n".join(story_bytes("train"))), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - WINDOW, (BYTE_BATCH,), generator=generator).tolist()
        rows = torch.stack([data[start : start + WINDOW + 1] for start in starts])
        yield rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def byte_bits(model: nn.Module, data: bytes) -> float:
    """Return the bits of a text under a network of bytes: windows that overlap by half, only the new half counted."""
    ids = torch.tensor(list(b"\n" + data))
    model.eval()
    total, half = 0.0, WINDOW // 2
    for start in range(0, len(ids) - 1, half):
        first = max(0, start - half)
        inputs, targets = ids[None, first : start + half], ids[None, first + 1 : start + half + 1]
        nats = next_token_loss(model(inputs[:, : targets.shape[1]]), targets, reduction="none")[0]
        total += nats[start - first :].double().sum().item()
    return total / math.log(2)


# The runs


def stories_of(role: str) -> int:
    """Return how many tales a runner reads in a role."""
    return {"race": N_TRAINING, "choice": N_TRAINING // 3, "long": N_LONG}[role]


def run_counts(text: str, runner: str, seed: int, *, role: str = "race") -> tuple[dict, str]:
    """Count, judge, and let the model write."""
    started = time.process_time()
    if text == "tales":
        order = COUNTS[runner]
        rows = [tale_ids(story) for story in training_texts(seed, stories_of(role))]
        model = NGramModel(order, VOCAB_SIZE, modified=True).fit(rows)
        seconds = time.process_time() - started
        end = tale_encoding().eot_token
        sample = tale_encoding().decode(model.sample(200, seed=seed, stop=end)).removesuffix("<|endoftext|>")
        found = judge(bits_of_counts(model), test_stories())
    else:
        order = BYTE_COUNTS[runner]
        rows = [list(story) for story in story_bytes("train")]
        model = NGramModel(order, 256, modified=True).fit(rows)
        seconds = time.process_time() - started
        sample = bytes(model.sample(300, seed=seed)).decode(errors="replace")
        test = story_bytes("test")[0]
        found = {"bits_per_byte": round(-float(model.log2_probabilities(test).sum()) / len(test), 4)}
    detail = f"order {order}"
    size = {
        "parameters": model.n_counts,
        "tokens_read": sum(map(len, rows)),
        "cpu_seconds": round(seconds, 1),
    }
    return {"detail": detail, **size, **found}, sample


def run_network(text: str, runner: str, seed: int, rate: float, *, role: str) -> tuple[dict, str]:
    """Train a network, judge it, and let it write; the role "choice" is a third of the training, judged by its loss."""
    network = NETWORKS[runner]
    torch.manual_seed(seed)
    model = network.for_tales() if text == "tales" else network.for_bytes()
    n_stories = stories_of(role)
    n_steps = n_stories // BATCH if text == "tales" else BYTE_STEPS if role == "race" else BYTE_STEPS // 3
    batches = tale_batches(seed, n_stories) if text == "tales" else byte_batches(seed)
    started = time.process_time()
    n_tokens = fit(model, batches, rate, n_steps)
    seconds = time.process_time() - started
    model.eval()
    sample = ""
    if text == "tales":
        bits = bits_of_network(model)
        stories = test_stories() if role != "choice" else test_stories(TEST_SEED + 2)[:50]
        if role != "choice":
            found = judge(bits, stories)
            end = tale_encoding().eot_token
            sample = tale_encoding().decode(sample_ids(model, end, 200, seed=seed, stop=end))
        else:
            n_bytes = sum(len(story.text.encode()) for story in stories)
            found = {"bits_per_byte": round(sum(bits([story.text for story in stories])) / n_bytes, 4)}
    else:
        data = story_bytes("test" if role == "race" else "validation")[0]
        found = {"bits_per_byte": round(byte_bits(model, data) / len(data), 4)}
        if role == "race":
            sample = bytes(sample_ids(model, 10, WINDOW, seed=seed)).decode(errors="replace")
    size = {
        "parameters": sum(weights.numel() for weights in model.parameters()),
        "tokens_read": n_tokens,
        "cpu_seconds": round(seconds, 1),
    }
    return {"detail": "", **size, **found}, sample


def run_shipped(runner: str) -> tuple[dict, str]:
    """Judge a checkpoint of the course, which had far more stories and time."""
    model = load_pretrained(runner)
    end = tale_encoding().eot_token
    sample = tale_encoding().decode(sample_ids(model, end, 250, seed=0, stop=end))
    stories = SHIPPED[runner]
    found = judge(bits_of_network(model), test_stories())
    return {"detail": f"{stories:,} stories", "parameters": model.n_parameters, **found}, sample


def run_rules(text: str) -> tuple[dict, str]:
    """Judge the rules: a mixture with uniform bytes, since the rules alone give every other text probability 0."""
    rules = RuleWriter()
    texts = [s.text for s in test_stories()] if text == "tales" else [story_bytes("test")[0].decode()]
    possible = sum(rules.probability(story) > 0 for story in texts)
    uniform = [8.0 * (len(story.encode()) + 1) for story in texts]  # one byte more for the end
    chances = [rules.probability(story) for story in texts]
    bits = sum(
        -math.log2(0.5 * chance + 0.5 * 2.0**-n) if chance else n + 1
        for chance, n in zip(chances, uniform, strict=True)
    )
    n_bytes = sum(len(story.encode()) for story in texts)
    detail = f"{possible} of {len(texts)} texts possible; half of the probability on uniform bytes"
    size = {"parameters": sum(map(len, rules.choices)), "tokens_read": 0, "cpu_seconds": 0.0}
    found = dict.fromkeys(KINDS, 0.5) if text == "tales" else {}
    return {"detail": detail, **size, "bits_per_byte": round(bits / n_bytes, 4), **found}, rules.sample(0)


def run_compressor(runner: str, with_training: bool) -> dict:
    """Return the size of the test story, by itself or as what it adds to the training stories, in bits per byte."""
    compress, test = COMPRESSORS[runner], story_bytes("test")[0]
    train_text = b"\n\n\n\n".join(story_bytes("train")) if with_training else b""
    started = time.process_time()
    size = len(compress(train_text + test)) - (len(compress(train_text)) if with_training else 0)
    return {
        "detail": "after the training stories" if with_training else "by itself",
        "tokens_read": len(train_text),
        "cpu_seconds": round(time.process_time() - started, 1),
        "bits_per_byte": round(8 * size / len(test), 4),
    }


@torch.no_grad()
def smollm2_bits(model: GPTModel, ids: Sequence[int]) -> float:
    """Return the bits of a text under a large model, after its end token; the output head works on pieces."""
    tokens: Tensor = torch.tensor([ids])
    hidden = model.hidden_states(tokens[:, :-1])
    nats = 0.0
    for start in range(0, hidden.shape[1], 256):
        logits = model.output_head(hidden[:, start : start + 256])
        nats += (
            next_token_loss(logits, tokens[:, 1 + start : 257 + start], reduction="none")
            .double()
            .sum()
            .item()
        )
    return nats / math.log(2)


def run_smollm2() -> tuple[dict, str]:
    """Judge SmolLM2 as it came, on the same test story."""
    name = "smollm2-135m-instruct"
    model, tokenizer = load_pretrained(name), load_tokenizer(name)
    start = tokenizer.special_ids["<|endoftext|>"]
    test = story_bytes("test")[0]
    bits = smollm2_bits(model, [start, *tokenizer.encode(test.decode())])
    sample = tokenizer.decode(sample_ids(model, start, 60, seed=0, stop=start))
    row = {"detail": "2 trillion tokens", "parameters": model.n_parameters}
    return {**row, "bits_per_byte": round(bits / len(test), 4)}, sample


def plan(runners: Sequence[str]) -> Iterator[tuple[str, str, str, int, float | None]]:
    """Yield (text, runner, role, seed, rate) for each run; the rate of a race is None until it is chosen."""
    for text in ("tales", "stories"):
        for runner in runners:
            if runner in NETWORKS:
                yield from (
                    (text, runner, "choice", CHOICE_SEED, rate) for rate in NETWORKS[runner].rates[text]
                )
                yield from ((text, runner, "race", seed, None) for seed in SEEDS)
                if text == "tales" and runner == "gru":
                    yield text, runner, "long", SEEDS[0], LONG_RATE
            elif runner in COUNTS:
                if text == "tales" and runner == "kneser-ney":
                    yield text, runner, "long", SEEDS[0], None
                yield from (
                    (text, runner, "race", seed, None) for seed in (SEEDS if text == "tales" else (0,))
                )
            elif (runner in SHIPPED) == (text == "tales") or runner == "rules":
                yield text, runner, "race", 0, None


def chosen_rate(text: str, runner: str) -> float:
    """Return the rate with the lowest loss on the seed for choices."""
    rows = [r for r in read_rows(RESULTS) if (r["text"], r["runner"], r["role"]) == (text, runner, "choice")]
    return float(min(rows, key=lambda row: float(row["bits_per_byte"]))["learning_rate"])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runner", nargs="+", choices=RUNNERS, default=list(RUNNERS), help="default: all")
    parser.add_argument("--again", action="store_true", help="also what the record has already")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for text, runner, role, seed, rate in plan(options.runner):
        if rate is None and runner in NETWORKS:
            rate = chosen_rate(text, runner)
        key = (text, runner, role, str(seed), "" if rate is None else str(rate))
        if not options.again and any(tuple(row[name] for name in KEY) == key for row in read_rows(RESULTS)):
            continue
        if runner == "smollm2" and not has_model("smollm2-135m-instruct"):
            print("smollm2: its package is not installed, passed over")
            continue
        record(key, *run(text, runner, role, seed, rate))


def run(text: str, runner: str, role: str, seed: int, rate: float | None) -> tuple[dict, str]:
    """Do one run of the plan; return its row and what the runner wrote, if it writes."""
    if runner in NETWORKS:
        return run_network(text, runner, seed, rate, role=role)
    if runner in COUNTS:
        return run_counts(text, runner, seed, role=role)
    if runner in SHIPPED:
        return run_shipped(runner)
    if runner == "rules":
        return run_rules(text)
    if runner == "smollm2":
        return run_smollm2()
    return run_compressor(runner, with_training=True), ""


def record(key: Sequence[str], row: dict, sample: str) -> None:
    """Write a row, and the sample of the first seed, and print the row."""
    hardware = {"hardware": f"{cpu_name()}, 1 thread", "torch": torch.__version__}
    replace_row(RESULTS, COLUMNS, {**dict(zip(KEY, key, strict=True)), **row, **hardware}, KEY)
    text, runner, role, seed, _ = key
    if sample and role == "race" and seed == "0":
        replace_row(
            SAMPLES,
            ["text", "runner", "sample"],
            {"text": text, "runner": runner, "sample": sample},
            ("text", "runner"),
        )
    print(*key, {name: value for name, value in row.items() if value != ""}, flush=True)


if __name__ == "__main__":
    main()
