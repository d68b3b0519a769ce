"""Measure continuous batching of SmolLM2 against one text at a time, a plain batch, and llama.cpp's server.

    python measure_serving.py [--threads 2] [--streams 32] [--new 64] [--rounds 3]

All sides have the same weights in float32 (llama.cpp reads them from a GGUF file that this script writes), the same
prompts, the same number of new tokens and threads, and choose the most probable token. They take turns; of each the
median of the rounds is shown, with the slowest and the fastest. Seconds are from the first prompt handed over to the
last token, reading the prompts included; llama.cpp is asked over HTTP on loopback, by one thread for each stream.
At the end each of our streams is compared with the same prompt alone, token by token.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from shared.generation.batching import BatchEngine, n_common
from shared.generation.engine import generate
from shared.weights.gguf_writer import write_gguf
from shared.weights.pretrained import load_pretrained, load_tokenizer

MODEL = "smollm2-135m-instruct"
OURS, SINGLE, THEIRS = "ours, continuous batching", "ours, one at a time", "llama.cpp's server"
TOPICS = ["Water", "Fire", "Bread", "Music", "Winter", "Paris", "Gold", "Sleep"]
QUESTIONS = ["is useful because", "was first", "is not the same as", "makes people think of"]

LLAMA = """
import sys, xllamacpp
path, streams, room, threads = sys.argv[1], *map(int, sys.argv[2:])
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_parallel, parameters.n_ctx = path, streams, streams * room
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
parameters.cache_ram_mib = 0
parameters.cache_type_k = parameters.cache_type_v = 0  # float32, as on our side
server = xllamacpp.Server(parameters)
print("ADDRESS", server.listening_address, flush=True)
sys.stdin.read()
"""


def prompts(tokenizer, n: int) -> list[list[int]]:
    """Return `n` different prompts of a few words."""
    texts = [f"{topic} {question}" for question in QUESTIONS for topic in TOPICS]
    return [tokenizer.encode_ordinary(f"{texts[i % len(texts)]} ({i})") for i in range(n)]


def batched(
    model: torch.nn.Module, texts: list[list[int]], n_new: int, context_length: int = 256
) -> list[list[int]]:
    """Continue all texts in one engine."""
    engine = BatchEngine(model, max_batch_size=len(texts), context_length=context_length)
    requests = [engine.submit(ids, max_new_tokens=n_new) for ids in texts]
    while engine.has_work:
        engine.step()
    return [request.generated for request in requests]


def llama(address: str, texts: list[list[int]], n_new: int) -> list[list[int]]:
    """Continue all texts with llama.cpp's server, a request each, all at the same time."""

    def ask(ids: list[int]) -> list[int]:
        asked = {"prompt": ids, "n_predict": n_new, "temperature": 0, "samplers": ["temperature"]}
        asked |= {"ignore_eos": True, "cache_prompt": False, "return_tokens": True}
        with urllib.request.urlopen(f"{address}/completion", json.dumps(asked).encode()) as answer:
            return json.load(answer)["tokens"]

    with ThreadPoolExecutor(len(texts)) as pool:
        return list(pool.map(ask, texts))


def tokens_per_second(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Return how many new tokens a second a run gives, and the tokens."""
    start = time.perf_counter()
    written = run()
    return sum(map(len, written)) / (time.perf_counter() - start), written


def show(name: str, speeds: list[float]) -> float:
    """Print a line of the table and return the median."""
    median = statistics.median(speeds)
    print(f"{name:40} {median:7.1f} tokens/s   ({min(speeds):.1f} to {max(speeds):.1f})")
    return median


def main() -> None:
    """Measure all sides in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("threads", 2), ("streams", 32), ("new", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_pretrained(MODEL, dtype=torch.float32), load_tokenizer(MODEL)
    texts, n_new = prompts(tokenizer, options.streams), options.new
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "float32.gguf")
        write_gguf(model, path, tokenizer, kind="F32")
        command = [sys.executable, "-c", LLAMA, str(path), str(options.streams), "256", str(options.threads)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            address = next(line.split()[1] for line in server.stdout if line.startswith("ADDRESS"))
            sides = {
                SINGLE: lambda: generate(model, texts[:1], n_new),
                "ours, a plain batch": lambda: generate(model, texts, n_new),
                OURS: lambda: batched(model, texts, n_new),
                "llama.cpp's server, one at a time": lambda: llama(address, texts[:1], n_new),
                THEIRS: lambda: llama(address, texts, n_new),
            }
            speeds: dict[str, list[float]] = {name: [] for name in sides}
            written = {}
            for _ in range(options.rounds):
                for name, run in sides.items():
                    speed, written[name] = tokens_per_second(run)
                    speeds[name].append(speed)
            server.stdin.close()
    # The table and what follows from it.
    print(f"{options.streams} streams, {n_new} new tokens each, float32, {options.threads} threads")
    median = {name: show(name, found) for name, found in speeds.items()}
    print(f"times one at a time: {median[OURS] / median[SINGLE]:.2f} (aim 5)")
    print(f"times llama.cpp's server: {median[OURS] / median[THEIRS]:.2f} (aim 1.5)")
    # Correctness, by the same run: each stream beside its prompt alone.
    alone = [generate(model, [ids], n_new)[0] for ids in texts]
    same = sum(a == b for a, b in zip(alone, written[OURS], strict=True))
    print(f"streams equal to the same prompt alone: {same} of {len(texts)}")
    # llama.cpp rounds otherwise, so its texts may part from ours at a near tie; they must begin alike.
    parted = [n_common(a, b) for a, b in zip(alone, written[THEIRS], strict=True)]
    print(
        f"tokens before llama.cpp's text parts from ours: median {statistics.median(parted):.0f} of {n_new}"
    )
    sys.exit(0 if same == len(texts) else 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
