"""Speed of our BPE tokenizer beside tiktoken and Hugging Face's tokenizers, on one thread, in one run.

    python -m tests.benchmarks.tokenizer_speed [--file TEXT] [--vocab-size 4096] [--repeats 7]

Without `--file` the text is tiny Shakespeare (1.1 MB) where it can be had, else the bundled stories (0.1 MB).
Runs of the candidates alternate, so that a slow spell of the machine meets all of them. All must give the same
ids. tiktoken cannot train.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # Hugging Face's trainer would take every core
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tokenizers

from shared.data.corpus import stories_text
from shared.data.download import fetch_or_none
from shared.text.merges import BYTE_TO_UNICODE
from shared.text.tokenizer import BPETokenizer


def alternate(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the running times of each candidate, in seconds; each round runs all of them once."""
    times = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, function in candidates.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return times


def train_hugging_face(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    """Train with Hugging Face's trainer."""
    result = tokenizers.Tokenizer(tokenizers.models.BPE())
    result.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    result.train_from_iterator([text], trainer)
    return result


def to_hugging_face(tokenizer: BPETokenizer) -> tokenizers.Tokenizer:
    """Put our merges into Hugging Face's tokenizer with its built-in GPT-2 pattern."""
    merges = [tuple("".join(map(BYTE_TO_UNICODE.get, part)) for part in merge) for merge in tokenizer.merges]
    names = [*BYTE_TO_UNICODE.values(), *map("".join, merges)]
    result = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, merges))
    result.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return result


def show(title: str, times: dict[str, list[float]], megabytes: float) -> None:
    """Print median, spread and rate, the fastest first."""
    print(f"\n{title:<28}{'median s':>10}{'min s':>9}{'max s':>9}{'MB/s':>9}")
    for name, values in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        middle = statistics.median(values)
        print(f"{name:<28}{middle:10.3f}{min(values):9.3f}{max(values):9.3f}{megabytes / middle:9.2f}")


def main() -> None:
    """Measure training, encoding and decoding."""
    parser = argparse.ArgumentParser(description="Compare the speed of BPE tokenizers.")
    parser.add_argument("--file", type=Path, help="a UTF-8 text")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    path = options.file or fetch_or_none("tinyshakespeare.txt", "shared/data/stories.txt")
    text = stories_text() if path is None else path.read_text(encoding="utf-8")
    megabytes = len(text.encode()) / 1e6

    ours = BPETokenizer.train(text, options.vocab_size)
    fast, hugging_face = ours.to_tiktoken(), to_hugging_face(ours)
    ids = ours.encode(text, disallowed_special=())
    assert ids == fast.encode(text, disallowed_special=()) == hugging_face.encode(text).ids
    print(
        f"{megabytes:.2f} MB, {ours.n_vocab:,} tokens, {len(ids):,} ids, {options.repeats} rounds, one thread"
    )

    training = {
        "ours": lambda: BPETokenizer.train(text, options.vocab_size),
        "Hugging Face tokenizers": lambda: train_hugging_face(text, options.vocab_size - 1),
    }
    show("training", alternate(training, options.repeats), megabytes)
    fresh = [BPETokenizer(ours.merges) for _ in range(options.repeats)]
    streamed = [text[i : i + 65_536] for i in range(0, len(text), 65_536)]
    encoding = {
        "ours, empty cache": lambda: fresh.pop().encode(text, disallowed_special=()),
        "ours, full cache": lambda: ours.encode(text, disallowed_special=()),
        "ours, stream, full cache": lambda: list(ours.encode_iterable(streamed, disallowed_special=())),
        "tiktoken": lambda: fast.encode(text, disallowed_special=()),
        "Hugging Face tokenizers": lambda: hugging_face.encode(text).ids,
    }
    show("encoding", alternate(encoding, options.repeats), megabytes)
    decoding = {"ours": lambda: ours.decode(ids), "tiktoken": lambda: fast.decode(ids)}
    show("decoding", alternate(decoding, options.repeats), megabytes)


if __name__ == "__main__":
    main()
