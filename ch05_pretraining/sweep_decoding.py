"""Measure what decoding settings do to the tales that `tales-1m` writes, and record it in `sweep_decoding.csv`.

    python sweep_decoding.py                          every setting
    python sweep_decoding.py --setting top-p=0.9      only some

For each setting it counts how many of its stories are whole stories of the grammar (quality), and measures in three
ways how much of the grammar it can write (diversity): distinct word 4-grams, the entropy of its choices, and how
probable the grammar's own stories still are. A run replaces the row of the same setting; the other rows stay.
One thread is used; on another processor single stories can differ.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from shared.generation.engine import Processor, apply_processors, generate
from shared.generation.sampling import (
    MinP,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    Typical,
)
from shared.model.gpt import GPTConfig, GPTModel
from shared.notebook.records import replace_rows
from shared.pretraining.processes import cpu_name
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator
from shared.tales.scoring import score

RESULTS = Path(__file__).resolve().parent / "sweep_decoding.csv"
CHECKPOINTS = Path(__file__).resolve().parent.parent / "shared" / "checkpoints"
MODEL = "tales-1m"
END = tale_encoding().eot_token  # it also stands before the first token of a story
N_STORIES, BATCH = 192, 64
N_REAL, REAL_SEED = 64, 777  # the grammar's own stories, to see whether they stay probable
N_ENTROPY = 64  # stories along which the entropy is taken


@dataclass(frozen=True)
class Setting:
    """A way to decode: the family it belongs to in the figures, and its processors; or greedy."""

    family: str
    processors: tuple[Processor, ...] = ()
    greedy: bool = False


def _settings() -> dict[str, Setting]:
    found = {"greedy": Setting("greedy", (TopK(1),), greedy=True)}
    for temperature in (0.1, 0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5):
        processors = () if temperature == 1 else (Temperature(temperature),)
        found[f"temperature={temperature}"] = Setting("temperature", processors)
    for family, make, values in (
        ("top-k", TopK, (5, 20, 100)),
        ("top-p", TopP, (0.5, 0.8, 0.9, 0.95, 0.99)),
        ("min-p", MinP, (0.5, 0.1, 0.05, 0.01)),
        ("typical", Typical, (0.9,)),
        ("repetition penalty", RepetitionPenalty, (1.05, 1.1, 1.2)),
    ):
        for value in values:
            found[f"{family}={value}"] = Setting(family, (make(value),))
    for name, cut in (("top-k=20", TopK(20)), ("top-p=0.9", TopP(0.9)), ("min-p=0.1", MinP(0.1))):
        found[f"temperature=1.5, {name}"] = Setting("hot, then cut", (Temperature(1.5), cut))
        found[f"{name}, temperature=1.5"] = Setting("cut, then hot", (cut, Temperature(1.5)))
    return found


SETTINGS = _settings()
COLUMNS = [
    "setting",
    "family",
    "stories",
    "whole_stories",
    "sentences",
    "whole_in_first_batch",
    "unfinished",
    "distinct_4grams",
    "distinct_stories",
    "entropy",
    "entropy_error",
    "real_stories",
    "still_possible",
    "real_loss",
    "cpu_seconds",
    "hardware",
    "torch",
    "model",
    "model_sha256",
]


def load_tales(name: str = MODEL) -> GPTModel:
    """Return a shipped model of tales, ready for use."""
    folder = CHECKPOINTS / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
    model = GPTModel(GPTConfig(**config))
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if unexpected or set(missing) - {"output_head.weight"}:
        raise ValueError(f"{folder} does not fit its own configuration: {missing}, {unexpected}")
    return model.eval()


def write_batches(model: GPTModel, setting: Setting, n_stories: int) -> Iterator[list[list[int]]]:
    """Yield batches of stories as token ids, without end tokens; one that does not end fills the context."""
    limit = model.config.context_length - 1
    for start in range(0, n_stories, BATCH):
        size = min(BATCH, n_stories - start)
        # Greedy writes the same story every time: once is enough.
        prompts = [[END]] * (1 if setting.greedy else size)
        rows = generate(
            model,
            prompts,
            limit,
            temperature=0.0 if setting.greedy else 1.0,
            processors=setting.processors,
            stop_tokens=(END,),
            seed=start,  # story i is drawn with seed i
        )
        yield rows * size if setting.greedy else rows


def after_each_token(
    model: GPTModel, processors: Sequence[Processor], stories: Sequence[Sequence[int]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Read finished stories as the decoder would have: yield for each place of each batch what it chooses from.

    Yields processed logits (rows, vocab_size), the tokens that the stories have there (rows,), and the rows' numbers.
    Stories that are over are left out.
    """
    for start in range(0, len(stories), BATCH):
        batch = stories[start : start + BATCH]
        longest = max(len(story) for story in batch)
        ids = torch.full((len(batch), longest + 2), END)
        for row, story in enumerate(batch):
            ids[row, 1 : len(story) + 1] = torch.tensor(story)
        lengths = torch.tensor([len(story) for story in batch])
        with torch.no_grad():
            logits = model(ids[:, :-1])  # (rows, longest + 1, vocab_size)
        for place in range(longest + 1):
            rows = (lengths >= place).nonzero()[:, 0]
            here = apply_processors(processors, ids[rows, : place + 1], logits[rows, place])
            yield here, ids[rows, place + 1], rows + start


def choice_entropy(
    model: GPTModel, processors: Sequence[Processor], stories: list[list[int]]
) -> tuple[float, float]:
    """Return the entropy of the decoder over whole stories and its standard error, estimated along stories it wrote.

    In nats. The chain rule: it is the mean over stories of the summed entropies of the single choices.
    """
    total = torch.zeros(len(stories), dtype=torch.float64)
    for logits, _, rows in after_each_token(model, processors, stories):
        total[rows] += torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).double()
    return total.mean().item(), total.std().item() / len(stories) ** 0.5


def real_probability(
    model: GPTModel, processors: Sequence[Processor], stories: list[list[int]]
) -> tuple[int, float]:
    """Return how many of the stories the decoder could write, and the mean of -log p over all, end tokens included.

    A story is impossible if one of its tokens has been cut away; the mean is then infinite.
    """
    loss = torch.zeros(len(stories), dtype=torch.float64)
    for logits, targets, rows in after_each_token(model, processors, stories):
        loss[rows] -= logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0].double()
    return int(loss.isfinite().sum()), loss.mean().item()


def distinct_ngrams(texts: Sequence[str], n: int = 4) -> float:
    """Return the share of word n-grams in all texts together that are different ones."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / max(len(grams), 1)


def real_stories(n: int = N_REAL) -> list[list[int]]:
    """Return stories of the grammar as token ids."""
    return [tale_encoding().encode_ordinary(story.text) for story in TaleGenerator(REAL_SEED).stories(n)]


def measure(name: str, model: GPTModel) -> dict[str, object]:
    """Measure one setting of `SETTINGS` and return its row of the record; ValueError if it is unknown."""
    if name not in SETTINGS:
        raise ValueError(f"name is {name!r}; allowed are {', '.join(SETTINGS)}")
    setting, started = SETTINGS[name], time.process_time()

    # What it writes.
    batches = list(write_batches(model, setting, N_STORIES))
    stories = [story for batch in batches for story in batch]
    limit = model.config.context_length - 1
    texts = [tale_encoding().decode(story) for story in stories]

    # Quality: each different text is graded once. A story without an end is not whole.
    grades = {text: score(text) for text in set(texts) if text.strip()}
    whole = [
        text in grades and grades[text].story and len(s) < limit
        for text, s in zip(texts, stories, strict=True)
    ]
    sentences = [grades[text].sentences if text in grades else 0.0 for text in texts]

    # Diversity: the entropy of its choices, and what it leaves of the grammar's own stories.
    entropy, entropy_error = choice_entropy(model, setting.processors, stories[:N_ENTROPY])
    possible, real_loss = real_probability(model, setting.processors, real_stories())

    # The row of the record, with what the figures depend on.
    weights = (CHECKPOINTS / MODEL / "model.safetensors").read_bytes()
    return {
        "setting": name,
        "family": setting.family,
        "stories": len(stories),
        "whole_stories": sum(whole),
        "sentences": round(sum(sentences) / len(sentences), 4),
        "whole_in_first_batch": sum(whole[:BATCH]),
        "unfinished": sum(len(story) >= limit for story in stories),
        "distinct_4grams": round(distinct_ngrams(texts), 4),
        "distinct_stories": len(set(texts)),
        "entropy": round(entropy, 3),
        "entropy_error": round(entropy_error, 3),
        "real_stories": N_REAL,
        "still_possible": possible,
        "real_loss": round(real_loss, 3),
        "cpu_seconds": round(time.process_time() - started, 1),
        "hardware": f"{cpu_name()}, 1 thread",
        "torch": torch.__version__,
        "model": MODEL,
        "model_sha256": hashlib.sha256(weights).hexdigest(),
    }


def save(row: dict[str, object], path: Path = RESULTS) -> None:
    """Write a row to the record atomically; it replaces the row of the same setting, in the order of `SETTINGS`."""
    order = list(SETTINGS)
    replace_rows(path, COLUMNS, [row], lambda entry: order.index(entry["setting"]))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME", help="default: all"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_tales()
    for name in tqdm(options.setting, desc="settings", unit="setting"):
        row = measure(name, model)
        save(row)
        print(
            f"{name}: {row['whole_stories']} of {row['stories']} whole stories, entropy {row['entropy']:.1f} nats, "
            f"{row['still_possible']} of {row['real_stories']} real stories possible, {row['cpu_seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
