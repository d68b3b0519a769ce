"""Generation by our engine against Hugging Face's GPT-2 (SDPA) with the same weights, and speculative decoding.

    python -m tests.benchmarks.generation_speed                    all parts
    python -m tests.benchmarks.generation_speed --part small --threads 1 --rounds 15

Parts: `large` is GPT-2's 124M shape with random weights, batch 1, ours in float32 and bfloat16, transformers in
float32. It is bound by memory bandwidth, so the bandwidth is measured in the same rounds, by summing 512 MiB and by
a matrix-vector product over them: both only read, as decoding does, and the faster of the two counts. The share is
bytes read per token (all weights but the position table, and the cache) times tokens per second over that bandwidth.
What the matrix products of one token alone reach, each weight matrix times a vector, is shown beside it: no decoder
that calls them is faster.
Times are of decoding alone: a text of n + 1 tokens less one of 1 token.
`small` is 4 layers of 128 dimensions, 4 heads, vocabulary 2,048 (`--vocab-size`), batch 1 and 8, prefill included.
`speculative` continues tales greedily, on the largest shipped checkpoint of tales, by prompt lookup and with
`tales-tiny` as the draft, against our own plain generation; every output must be the same.

All contestants take turns, in an order that changes every round; ratios are taken within a round. Shown are medians and
quartiles. `--clock cpu` counts processor time: use it with `--threads 1` where other programs are running.
"""

import argparse
import copy
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from shared.generation.engine import generate
from shared.generation.speculation import DraftModel, PromptLookup, generate_speculatively
from shared.model.gpt import GPTConfig, GPTModel
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator
from tests.benchmarks.training_step import CLOCKS, copy_weights, hardware

ROOT = Path(__file__).resolve().parents[2]
OURS, THEIRS, HALF = "ours", "transformers", "ours, bfloat16"
PRODUCTS = "the model's products alone"
Contestants = dict[str, Callable[[], object]]


def pair(**shape: int) -> tuple[GPTModel, GPT2LMHeadModel]:
    """Return our GPT-2 of a shape with random weights, and transformers' with the same ones."""
    torch.manual_seed(0)
    ours = GPTModel(GPTConfig(**shape)).eval()
    config = ours.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.emb_dim,
            n_head=config.n_heads,
            n_layer=config.n_layers,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    copy_weights(ours, theirs)
    return ours, theirs


def their_generate(model: GPT2LMHeadModel, ids: torch.Tensor, n: int) -> list[list[int]]:
    """Greedy generation as the library's documentation calls it."""
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)
    return written[:, ids.shape[1] :].tolist()


def rounds_of(contestants: Contestants, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Run all contestants in every round, in changing order; return their seconds. A first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            contestants[name]()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def spread(values: list[float], form: str = "8.1f") -> str:
    """Median, and the range of the middle half."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:{form}}  ({low:{form.lstrip('8')}} to {high:{form.lstrip('8')}})"


def ratios(first: list[float], second: list[float]) -> list[float]:
    """Divide round by round."""
    return [a / b for a, b in zip(first, second, strict=True)]


def large(options: argparse.Namespace) -> None:
    """124M parameters at batch 1: who uses how much of the bandwidth."""
    ours, theirs = pair()
    half = copy.deepcopy(ours).bfloat16()
    prompt, n = torch.randint(50257, (1, 32)), 32
    if generate(ours, prompt, n) != their_generate(theirs, prompt, n):
        raise SystemExit("the models wrote different texts")
    big = torch.randn(2**14, 2**13)  # 512 MiB
    vector = torch.randn(2**13)
    matrices = [m.weight.detach() for m in ours.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.shape[1]: torch.randn(1, m.shape[1]) for m in matrices}
    products = lambda: [F.linear(inputs[m.shape[1]], m) for m in matrices]
    n_bytes = {
        "sum": big.nbytes,
        "matrix times vector": big.nbytes,
        PRODUCTS: sum(m.nbytes for m in matrices),
    }
    runs: Contestants = {"sum": big.sum, "matrix times vector": lambda: big @ vector, PRODUCTS: products}
    for name, run in (
        (OURS, partial(generate, ours, prompt)),
        (HALF, partial(generate, half, prompt)),
        (THEIRS, partial(their_generate, theirs, prompt)),
    ):
        runs |= {f"{name}: 1": partial(run, 1), f"{name}: n": partial(run, n + 1)}
    seconds = rounds_of(runs, options.rounds, CLOCKS[options.clock])
    reads = {name: [size / s / 1e9 for s in seconds[name]] for name, size in n_bytes.items()}
    print("124M, batch 1, a prompt of 32 tokens, 32 decoded")
    for name, values in reads.items():
        print(f"  bandwidth by {name:26} {spread(values)} GB/s")
    bandwidth = max(map(statistics.median, reads.values()))
    config, speeds = ours.config, {}
    for name, size in ((OURS, 4), (HALF, 2), (THEIRS, 4)):
        times = ratios(
            [b - a for a, b in zip(seconds[f"{name}: 1"], seconds[f"{name}: n"], strict=True)],
            [n] * options.rounds,
        )
        read = size * (ours.n_parameters - config.context_length * config.emb_dim)
        read += size * 2 * config.n_layers * config.emb_dim * (prompt.shape[1] + n // 2)
        speeds[name] = [1 / s for s in times]
        share = statistics.median(speeds[name]) * read / bandwidth / 1e9
        print(f"  {name:15} {spread(speeds[name])} tokens/s, {share:.0%} of the bandwidth")
    print(f"  ours / transformers {spread(ratios(speeds[OURS], speeds[THEIRS]), '.2f')} (aim: at least 1)")
    print(f"  bfloat16 / float32  {spread(ratios(speeds[HALF], speeds[OURS]), '.2f')}\n")


def small(options: argparse.Namespace) -> None:
    """4 layers of 128 dimensions: what counts is the overhead of each token."""
    ours, theirs = pair(vocab_size=options.vocab_size, context_length=256, emb_dim=128, n_heads=4, n_layers=4)
    for batch, aim in ((1, 2.5), (8, 2.0)):
        prompt, n = torch.randint(options.vocab_size, (batch, 16)), 100
        if generate(ours, prompt, n) != their_generate(theirs, prompt, n):
            raise SystemExit("the models wrote different texts")
        runs = {OURS: partial(generate, ours, prompt, n), THEIRS: partial(their_generate, theirs, prompt, n)}
        seconds = rounds_of(runs, options.rounds, CLOCKS[options.clock])
        print(
            f"4 layers x 128, vocabulary {options.vocab_size:,}, batch {batch}, 16 tokens read, {n} written"
        )
        for name, times in seconds.items():
            print(f"  {name:15} {spread([batch * n / s for s in times])} tokens/s")
        gain = ratios(seconds[THEIRS], seconds[OURS])
        print(f"  ours / transformers {spread(gain, '.2f')} (aim: at least {aim})\n")


def load(folder: Path) -> GPTModel:
    """Load a shipped checkpoint."""
    model = GPTModel(GPTConfig(**json.loads((folder / "config.json").read_text())["model"])).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model


def speculative(options: argparse.Namespace) -> None:
    """Greedy stories from a trained model: plain, and with guesses by lookup or by a draft model."""
    models = {
        folder.parent.name: load(folder.parent) for folder in options.checkpoints.glob("tales-*/config.json")
    }
    if len(models) < 2:
        print(f"speculative: needs tales-tiny and a larger checkpoint in {options.checkpoints}\n")
        return
    name, model = max(models.items(), key=lambda item: item[1].n_parameters)
    encoding, n = tale_encoding(), 110
    stops = [encoding.eot_token]
    begun = [[*stops, *encoding.encode_ordinary(s.text)[:40]] for s in TaleGenerator(77).stories(8)]
    corpus = [t for s in TaleGenerator(78).stories(500) for t in encoding.encode_ordinary(s.text)]
    runs = {"plain": lambda: [generate(model, [ids], n, stop_tokens=stops)[0] for ids in begun]}
    stories = {}
    for guesses, n_ahead, drafter in (
        ("prompt lookup", 4, PromptLookup(3)),
        ("lookup, 500 other stories", 8, PromptLookup(8, corpus)),
        ("tales-tiny", 3, DraftModel(models["tales-tiny"])),
        ("tales-tiny", 6, DraftModel(models["tales-tiny"])),
    ):
        label = f"{guesses}, {n_ahead} ahead"
        stories[label] = lambda d=drafter, a=n_ahead: [
            generate_speculatively(model, ids, n, d, n_ahead=a, stop_tokens=stops) for ids in begun
        ]
    expected = runs["plain"]()
    print(f"{name}, {model.n_parameters:,} parameters, greedy, 8 stories, {sum(map(len, expected))} tokens")
    for label, run in stories.items():
        results = run()
        if [result.ids for result in results] != expected:
            raise SystemExit(f"{label} wrote different texts")
        passes, proposed, accepted = (
            sum(getattr(result, field) for result in results)
            for field in ("n_passes", "n_proposed", "n_accepted")
        )
        saved = 1 - passes / (sum(map(len, expected)) + len(begun))
        print(
            f"  {label:36} {accepted / proposed:4.0%} of the guesses accepted, {saved:4.0%} of the passes saved"
        )
    seconds = rounds_of(runs | stories, options.rounds, CLOCKS[options.clock])
    for label in stories:
        gain = ratios(seconds["plain"], seconds[label])
        print(f"  {label:36} {spread(gain, '.2f')} times as fast (aim: at least 1.5)")
    print()


PARTS = {"large": large, "small": small, "speculative": speculative}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each contestant")
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS))
    parser.add_argument("--vocab-size", type=int, default=2048, help="of the small model")
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "shared" / "checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    print(f"{hardware(torch.device('cpu'))}; {options.clock} time\n")
    for part in options.part:
        PARTS[part](options)


if __name__ == "__main__":
    main()
